"""The manifest that is already in the output folder.

Owns: keeping or dropping edited lines, and the note on clips that were held out before.
Must not know: how clips are made. Edits are found in `data.edits`.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from wanlora.core import units
from wanlora.data.clip import TRAIN, Clip
from wanlora.data.edits import MANIFESTS, Edits, back_up, keep
from wanlora.errors import ManifestError

Choice = Literal["keep", "drop"] | None
"""Setting `edits`: keep or drop them; None if the user did not choose."""


def require_choice(edits: Edits, choice: Choice, folder: Path) -> None:
    """Refuse to replace edited manifests, unless the user chose to.

    Raises:
        ManifestError: There are edits and no choice, or edits to keep that cannot be read.
    """
    if not edits or choice == "drop":
        return
    where = ", ".join(str(folder / name) for name in MANIFESTS)
    if choice is None:
        raise ManifestError(
            f"the manifest was edited since prepare wrote it ({where}: {edits}). Keep the edits "
            "with --edits keep, discard them with --edits drop (a copy of the edited file is kept "
            "in both cases), or choose another --output"
        )
    if edits.bad:
        raise ManifestError(
            "edits cannot be kept while lines cannot be read; correct them first:\n"
            + "\n".join(units.first([line.message for line in edits.bad], str(folder)))
        )


def with_edits(made: list[Clip], edits: Edits, choice: Choice) -> tuple[list[Clip], list[str]]:
    """Return the clips of the manifest, and notes on edits.

    Raises:
        ManifestError: A person removed every clip.
    """
    if not edits or choice == "drop":
        return made, []
    if choice is None:
        return made, [f"the manifest was edited ({edits}): add --edits keep or --edits drop"]
    clips, notes = keep(made, edits)
    if not clips:
        raise ManifestError("every clip was removed by hand; write them again with --edits drop")
    return clips, notes


def note_moved(folder: Path, clips: Sequence[Clip]) -> list[str]:
    """Note on clips that the earlier manifest holds out and the new one trains on."""
    path = folder / MANIFESTS[1]
    before = set()
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):  # a damaged line was refused, or is discarded on request
            before.add(dict(json.loads(line)).get("clip_id"))
    moved = sum(clip.split == TRAIN and clip.clip_id in before for clip in clips)
    if not moved:
        return []
    return [
        f"{moved} clips that were held out until now are trained on: compare no held-out loss of "
        "an earlier run with one of a later run"
    ]


def note_copies(folder: Path, edits: Edits) -> list[str]:
    """Copy manifests that a person edited, before they are replaced; note the copies."""
    if not edits:
        return []
    copies = ", ".join(path.name for path in back_up(folder))
    return [f"the edited manifest was copied to {copies}"]
