"""The micro model, and adapters that change what it does."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from wanlora.core import location
from wanlora.core.rng import Stream, generator
from wanlora.wan import model_folder


@pytest.fixture(scope="session")
def micro_home(tmp_path_factory):
    """A cache folder shared by the processes of one test session, set in the environment."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if run else base) / "wanlora-cache"
    home.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(location.CACHE_HOME, str(home))
        yield home


@pytest.fixture(scope="session")
def micro_folder() -> Path:
    """The micro model's folder: the real classes, small, and trained on a drawn world."""
    return model_folder.resolve("micro", model_folder.PIPELINE)


def random_tensors(transformer_or_parameters, seed: int = 1, scale: float = 0.1):
    """Values for every tensor of an adapter, B included, so that it changes the output."""
    return {
        name: torch.from_numpy(
            np.float32(scale)
            * generator(seed, Stream.INIT, index).standard_normal(
                tuple(parameter.shape), dtype=np.float32
            )
        )
        for index, (name, parameter) in enumerate(sorted(transformer_or_parameters.items()))
    }


def temporary_copy(folder: Path, target: Path) -> Path:
    """Copy a model folder so that a test may spoil it."""
    import shutil

    return Path(shutil.copytree(folder, target))
