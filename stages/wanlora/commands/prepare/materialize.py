"""Write clips as .npz files in the layout of plain data sets: `frames` uint8 `(T, H, W, 3)`.

Owns: OUTPUT/clips and the manifests of such clips.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from wanlora.commands.prepare.clip_files import FOLDER, file_name
from wanlora.data import npz
from wanlora.data.clip import Clip
from wanlora.data.clip_frames import load_unchanged
from wanlora.errors import MediaError
from wanlora.files import partial_path, publish, writing
from wanlora.media.source import SourceHashes, source_sha256


def materialize(
    clips: Sequence[Clip], output: Path, known: SourceHashes, *, step: Callable[[], object]
) -> tuple[list[Clip], list[tuple[Clip, MediaError]]]:
    """Write every clip's frames, exactly as stage one would load them, and describe the files.

    An existing file of the right size is kept, so that a killed run continues. Its name contains
    the source's hash, the start and the size, so it is the same cut.

    Args:
        clips: Clips of any kind.
        output: Folder of the manifest.
        known: Hashes of the sources; hashes of the new files are added.
        step: Called after each clip.

    Returns:
        The clips of the new files, and the failures.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    made, failed = [], []
    for clip in clips:
        path = folder / file_name(clip)
        try:
            if not _is_there(path, clip):
                _require_free(path, clip)
                _write(path, clip, known)
            made.append(_described(clip, path, known))
        except MediaError as error:
            failed.append((clip, error))
        step()
    return made, failed


def _described(clip: Clip, path: Path, known: SourceHashes) -> Clip:
    return replace(
        clip,
        kind="npz",
        source=f"{FOLDER}/{path.name}",
        source_sha256=source_sha256(path.absolute(), known),
        start_s=0.0,
        transform={},
        orig={**clip.orig, "source": clip.source, "start_s": clip.start_s},
        path=path.absolute(),
    )


def _is_there(path: Path, clip: Clip) -> bool:
    try:
        return npz.read_size(path) == clip.bucket
    except MediaError:
        return False


def _require_free(path: Path, clip: Clip) -> None:
    """Refuse to replace a file: it is damaged, or a person has changed it."""
    if os.path.lexists(path):
        raise MediaError(
            "unreadable",
            f"{path} exists and is not a clip of {clip.bucket}, so it is not replaced: move it "
            "away, then run the command again",
        )


def _write(path: Path, clip: Clip, known: SourceHashes) -> None:
    frames = load_unchanged(clip, known).permute(0, 2, 3, 1).contiguous().numpy()
    temporary = partial_path(path)
    with writing(path):
        try:
            with temporary.open("wb") as file:
                np.savez(file, frames=frames)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
