"""Names of the files that `prepare --materialize` writes, which are never sources.

Owns: OUTPUT/clips. Imports no torch.
"""

import re
from pathlib import Path

from wanlora.core.fingerprint import sha256_text
from wanlora.manifest import Clip
from wanlora.prepare import journal

FOLDER = "clips"
MAX_STEM = 180
"""Characters of a clip's name in a file name, so that no file system refuses it."""

_PATTERN = re.compile(r"-\d+x\d+x\d+-[0-9.e+-]+fps\.npz")


def file_name(clip: Clip) -> str:
    """Name of a clip's file: source's hash, start and size are in it."""
    stem = clip.clip_id
    if len(stem.encode()) > MAX_STEM:
        stem = f"{stem.encode()[:MAX_STEM].decode(errors='ignore')}-{sha256_text(clip.clip_id)[:8]}"
    return f"{stem}-{clip.bucket}-{clip.fps:g}fps.npz"


def is_clip_file(path: Path) -> bool:
    """Return whether `--materialize` wrote a file: its name, and a journal beside its folder."""
    return (
        path.parent.name == FOLDER
        and _PATTERN.search(path.name) is not None
        and (path.parent.parent / journal.NAME).is_file()
    )
