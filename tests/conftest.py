"""Shapes and types in signatures are checked in every test: jaxtyping with beartype."""

from jaxtyping import install_import_hook

import tests.support.typecheck  # noqa: F401  (named by the hook below)

install_import_hook(
    [
        "wanlora.core",
        "wanlora.media",
        "wanlora.clips",
        "wanlora.store",
        "wanlora.wan",
        "wanlora.step",
        "wanlora.train",
        "wanlora.estimate",
    ],
    "tests.support.typecheck.check",
)

pytest_plugins = ("tests.support.models", "tests.support.caches")
