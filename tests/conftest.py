"""Shapes and types in signatures are checked in every test: jaxtyping with beartype."""

from hypothesis import settings
from jaxtyping import install_import_hook

import tests.support.typecheck  # noqa: F401  (named by the hook below)

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

pytest_plugins = ("tests.support.models", "tests.support.caches", "tests.support.s3")
