"""Shapes and types in signatures are checked in every test: jaxtyping with beartype."""

import functools
import os
import platform
from importlib.metadata import version
from typing import Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.support.typecheck  # noqa: F401  (named by the hook below)

# As the processes that tests start: with more threads, results differ in the last bits. torch
# reads it when it is first imported, which is below.
os.environ.setdefault("OMP_NUM_THREADS", "1")

install_import_hook(
    [
        "wanlora.core",
        "wanlora.media",
        "wanlora.data.clip_frames",
        "wanlora.store",
        "wanlora.wan",
        "wanlora.training",
        "wanlora.commands.train",
        "wanlora.commands.estimate",
    ],
    "tests.support.typecheck.check",
)

# A time limit per example would depend on the machine's load. pytest-timeout stops what hangs.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

REPORTED = (
    "torch", "diffusers", "transformers", "peft", "zarr", "numcodecs", "av", "numpy",
)  # fmt: skip
"""The packages of the table of tested versions in docs/faq.md."""

pytest_plugins = ("tests.support.models", "tests.support.caches", "tests.support.s3")


def pytest_report_header() -> str:
    """The row of the table that this run is."""
    versions = (f"{name} {version(name)}" for name in REPORTED)
    return f"tested with: Python {platform.python_version()}, {', '.join(versions)}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests of a file that has a module's fixture in one worker, so that it is made once.

    The groups of `--dist loadgroup` itself are lost: xdist 3.8 writes them where pytest 9.2 does
    not read. Files with the most tests run first, single tests fill the end.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def has_module_fixture(file: str) -> bool:
        return 'scope="module"' in (config.rootpath / file).read_text()

    class FileOrTest(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if has_module_fixture(file) else nodeid

    return FileOrTest(config, log)
