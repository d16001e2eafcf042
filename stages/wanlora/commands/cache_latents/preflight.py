"""Checks of `cache-latents` that need no torch: a mistake is refused before slow imports.

Owns: the order of these checks, and the reading of the manifests. Must not import torch or zarr.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from wanlora.config import CacheLatentsConfig
from wanlora.data import manifest
from wanlora.data.clip import Clip
from wanlora.data.source_root import require_folders
from wanlora.errors import ConfigError, OutputError, StoreError
from wanlora.files import require_folder
from wanlora.media.source import SOURCES, parse_hashes
from wanlora.processes.ranks import rank_of
from wanlora.store import index, storage
from wanlora.store.schema import VIEWS
from wanlora.store.views import View, read_view
from wanlora.wan.model_folder import ENCODERS, encoders_of, resolve_here
from wanlora.wan.variants import variant_of


def check(config: CacheLatentsConfig) -> tuple[list[Clip], list[manifest.BadLine]]:
    """Refuse settings, a manifest, a cache or a model folder that cannot be used.

    A model of the hub is not downloaded here; it is checked when it is.

    Returns:
        The clips of the manifests, and their lines that cannot be used.

    Raises:
        ConfigError: Two launchers at once.
        OutputError: The cache folder cannot be written, or has files of something else.
        ManifestError: A manifest cannot be read, or a `--source-root` is not a folder.
        StoreVersionError: The cache belongs to another release.
        ModelError: The model folder does not exist, or is incomplete or of an unknown variant.
    """
    _require_one_launcher(config)
    if isinstance(config.cache, Path):
        require_folder(config.cache, flag="--cache")
        if not index.has_store(config.cache):
            _require_own_files(config.cache, config.view)
    clips, bad_lines = read_manifests(config.manifest, config.source_root)
    index.has_store(config.cache)
    require_known_model(config.model)
    return clips, bad_lines


def read_manifests(
    manifests: Sequence[Path], source_root: Sequence[Path]
) -> tuple[list[Clip], list[manifest.BadLine]]:
    """Read the clips of manifests, and their lines that cannot be used.

    Raises:
        ManifestError: A manifest cannot be read, or a `--source-root` is not a folder.
    """
    require_folders(source_root)
    bad_lines: list[manifest.BadLine] = []
    clips = manifest.read_all(manifests, on_bad=bad_lines.append)
    manifest.warn_of_old_colours(clips)
    return clips, bad_lines


def require_known_model(model: str) -> None:
    """Check the model's folder, unless it is a model of the hub that will be downloaded.

    Raises:
        ModelError: The folder does not exist, or is incomplete or of an unknown variant.
    """
    if folder := resolve_here(model, ENCODERS):
        resolve_here(model, encoders_of(variant_of(folder).kinds))


def check_view(config: CacheLatentsConfig) -> View:
    """Read the view whose prompts are added to.

    Raises:
        StoreError: There is no such cache or view.
    """
    index.open_store(config.cache)
    return read_view(config.cache, config.view)


def _require_one_launcher(config: CacheLatentsConfig) -> None:
    rank = rank_of(os.environ)
    if rank.world > 1 and (config.launcher != "local" or (config.num_workers or 1) > 1):
        raise ConfigError(
            f"this process is rank {rank.index} of {rank.world} (torchrun or srun started it), and "
            "a rank is one worker: leave out --launcher and --num-workers"
        )


def _require_own_files(cache: Path, view: str) -> None:
    """Refuse a folder without a store that has files of other programs under names of a cache.

    Raises:
        OutputError: Names the first such file.
    """
    own = {SOURCES: _is_sources(cache), f"{VIEWS}/{view}.json": _is_view(cache, view)}
    for name, is_own in own.items():
        if not is_own:
            raise OutputError(
                f"{cache / name} was not written by cache-latents, which writes a file of this "
                "name: choose another folder with --cache, or move the file away"
            )


def _is_sources(cache: Path) -> bool:
    document = storage.at(cache).get(SOURCES)
    known = parse_hashes(document)
    return document is None or (bool(known) and all(map(os.path.isabs, known)))


def _is_view(cache: Path, view: str) -> bool:
    try:
        return not (cache / VIEWS / f"{view}.json").exists() or bool(read_view(cache, view))
    except StoreError:
        return False
