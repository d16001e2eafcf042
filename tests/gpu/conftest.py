"""Devices of the tests in this folder: a GPU, and a CPU if a test can hold there too.

On a CPU such a test shows that its own code runs and what it asserts is true of torch's kernels
there; that it is true of a GPU's, only a GPU shows.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import cli

ROOT = Path(__file__).parents[2]
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("default"),  # other releases warn of other things
]


def pytest_generate_tests(metafunc):
    """Parametrize `device`: marked gpu, a test has no CPU; slow_on_cpu, CI does without that."""
    if "device" in metafunc.fixturenames:
        gpu_only, slow_on_cpu = (
            metafunc.definition.get_closest_marker(name) is not None
            for name in ("gpu", "slow_on_cpu")
        )
        on_gpu = pytest.param(torch.device("cuda"), marks=GPU, id="cuda")
        on_cpu = pytest.param(
            torch.device("cpu"), marks=pytest.mark.slow if slow_on_cpu else (), id="cpu"
        )
        metafunc.parametrize("device", [on_gpu] if gpu_only else [on_cpu, on_gpu], scope="session")


@pytest.fixture
def command(device, micro_home) -> Callable[..., None]:
    """Run a command on the device; for a GPU in a new process, as CUDA does not survive a fork."""

    def run(*words: object) -> None:
        if device.type == "cpu":
            cli.run(*words)
            return
        done = subprocess.run(
            cli.command(*words), env=os.environ | cli.ENVIRONMENT, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"

    return run


@pytest.fixture
def figures_of(device) -> Callable[..., dict]:
    """Run a module of tests.support that prints JSON: compiled code needs a process of its own.

    There no type checker is wrapped around functions, and a compiler's warnings are no errors.
    """

    def run(module: str, *arguments: object) -> dict:
        done = subprocess.run(
            [sys.executable, "-m", f"tests.support.{module}", device.type, *map(str, arguments)],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
