"""Contract 1, the manifest: JSON lines, one clip per line.

Owns: the files of a manifest. Reads wanlora's own lines and those of plain .npz data sets (a path
and a prompt). A line that cannot be used is reported, and the others are read. Must not know: the
fields of a line, how pixels are decoded.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

from wanlora.core import units
from wanlora.core.shares import weight_problem
from wanlora.data.clip import TRAIN, VAL, Clip, has_hd_size
from wanlora.data.manifest_lines import MAX_LINE_BYTES, line_of, parse_line
from wanlora.errors import ManifestError
from wanlora.files import encode_text

log = logging.getLogger(__name__)


class BadLine(NamedTuple):
    """A line of a manifest that cannot be used.

    Attributes:
        where: Name of the manifest and number of the line, for example `train.jsonl:3`.
        message: Reason; starts with `where`.
    """

    where: str
    message: str

    @property
    def reason(self) -> str:
        """Message without `where`, for a list that has a column for it."""
        return self.message.removeprefix(f"{self.where}: ")


OnBad = Callable[[BadLine], object]


def warn(line: BadLine) -> None:
    """Log a bad line."""
    log.warning("%s; the line is not used", line.message)


def document(clips: Sequence[Clip]) -> bytes:
    """Bytes of a manifest."""
    return encode_text("".join(f"{line_of(clip)}\n" for clip in clips))


def read(path: Path, *, on_bad: OnBad = warn) -> list[Clip]:
    """Read a manifest: wanlora's own lines or plain ones.

    Args:
        path: The manifest.
        on_bad: Called for each line that cannot be used.

    Raises:
        ManifestError: The file is missing, is not UTF-8 text, or no line of it can be used.
    """
    clips: dict[str, Clip] = {}
    bad: list[BadLine] = []
    for where, line in lines(path):
        try:
            clip = parse_line(line, path, where)
            if (earlier := clips.get(clip.clip_id)) is not None:
                clip = _repeated(earlier, clip, where)
        except ManifestError as error:
            bad.append(BadLine(where, str(error)))
            continue
        clips[clip.clip_id] = clip
    if not clips:
        raise ManifestError(_nothing_usable(path, bad))
    for line_ in bad:
        on_bad(line_)
    return list(clips.values())


def _repeated(earlier: Clip, clip: Clip, where: str) -> Clip:
    """Merge two equal lines: their weights add up.

    Raises:
        ManifestError: They differ in more than the weight, or together weigh too much.
    """
    if replace(earlier, weight=clip.weight) != clip:
        raise ManifestError(
            f"{where}: clip {clip.clip_id} ({clip.source}) is in this manifest twice, with "
            "different values; write several captions of one clip as a list"
        )
    weight = earlier.weight + clip.weight
    if problem := weight_problem(weight):
        raise ManifestError(
            f"{where}: the lines of clip {clip.clip_id} have weight {weight:g} in all; {problem}"
        )
    return replace(clip, weight=weight)


def _nothing_usable(path: Path, bad: Sequence[BadLine]) -> str:
    if not bad:
        return f"{path} holds no clip; make one with: wanlora prepare VIDEOS"
    lines = units.count(len(bad), "bad line")
    shown = units.first([line.message for line in bad], str(path))
    return "\n".join([f"{path} holds no usable clip; {lines}:", *shown])


def read_all(paths: Sequence[Path], *, on_bad: OnBad = warn) -> list[Clip]:
    """Read several manifests as one; a folder means its train.jsonl and val.jsonl.

    Raises:
        ManifestError: As `read`, or two manifests name the same clip.
    """
    seen: dict[str, Path] = {}
    clips: list[Clip] = []
    for path in files(paths):
        for clip in read(path, on_bad=on_bad):
            if clip.clip_id in seen:
                raise ManifestError(
                    f"clip {clip.clip_id} is in {seen[clip.clip_id]} and in {path}; "
                    "a clip belongs to one manifest, or it would be trained on twice"
                )
            seen[clip.clip_id] = path
            clips.append(clip)
    return clips


def warn_of_old_colours(clips: Sequence[Clip]) -> None:
    """Log the number of clips whose colours may be wrong because their lines are of wanlora 0.1.

    It read HD video without a colour matrix as BT.601; such a line keeps its pixels and its key.
    """
    old = sum(
        clip.kind == "video" and "matrix" not in clip.orig and has_hd_size(clip) for clip in clips
    )
    if old:
        log.warning(
            "%d clips of HD videos have lines of wanlora 0.1, which read HD video without a colour "
            "matrix as BT.601 (players: BT.709). Write them again with: wanlora prepare. Then "
            "cache-latents encodes only the clips whose colours change",
            old,
        )


def files(paths: Sequence[Path]) -> list[Path]:
    """Manifest files of paths; a folder means its train.jsonl and val.jsonl."""
    return [file for path in paths for file in _files(path)]


def _files(given: Path) -> list[Path]:
    if not given.is_dir():
        return [given]
    train, val = given / f"{TRAIN}.jsonl", given / f"{VAL}.jsonl"
    return [path for path in (train, val) if path.exists()] or [train]


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (`file:line`, bytes) of each line that is not blank; memory is bounded.

    A line longer than `MAX_LINE_BYTES` is cut there, one byte past the limit.

    Raises:
        ManifestError: The file is missing, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number in count(1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                rest = line
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
                if line.strip():
                    yield f"{path}:{number}", line
    except FileNotFoundError:
        raise ManifestError(
            f"no manifest at {path}; make one with: wanlora prepare VIDEOS"
        ) from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} is not a manifest: {error}") from None
