"""Names of the files that `prepare --materialize` writes, which are never sources.

Owns: OUTPUT/clips. Imports no torch.
"""

import re
from pathlib import Path

from wanlora.commands.prepare import journal
from wanlora.core.text import file_stem
from wanlora.data.clip import Clip

FOLDER = "clips"

_PATTERN = re.compile(r"-\d+x\d+x\d+-[0-9.e+-]+fps\.npz")


def file_name(clip: Clip) -> str:
    """Name of a clip's file: it holds everything that decides the pixels.

    These are the source's hash and the start (in the id), the size, the frame rate, and the rules
    that release 0.1.0 did not have.
    """
    rules = "-bt709" if clip.transform.get("matrix") == "bt709" else ""
    rules += "-coarse" if "timestamps" in clip.transform else ""
    return f"{file_stem(clip.clip_id)}{rules}-{clip.bucket}-{clip.fps:g}fps.npz"


def is_clip_file(path: Path) -> bool:
    """Return whether `--materialize` wrote a file: its name, and a journal beside its folder."""
    return (
        path.parent.name == FOLDER
        and _PATTERN.search(path.name) is not None
        and (path.parent.parent / journal.NAME).is_file()
    )
