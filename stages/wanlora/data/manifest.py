"""Contract 1, the manifest: JSON lines, one clip per line.

Owns: the fields of a line and their bounds, and what makes two clips the same. Reads wanlora's own
lines and those of plain .npz data sets (a path and a prompt). A line that cannot be used is
reported, and the others are read. Must not know: how pixels are decoded.

A relative path is relative to the manifest's folder, never to the working directory. In a line
that wanlora did not write it may also be relative to a folder above (`data/processed/clips/a.npz`
in `data/processed/train.jsonl`): the nearest folder where the file exists counts.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from wanlora.core import units
from wanlora.core.aspect import is_hd
from wanlora.core.buckets import DEFAULT_FPS, MAX_FPS, MAX_FRAMES, MAX_SIDE_PX, MIN_FPS, Bucket
from wanlora.core.fingerprint import fingerprint, sha256_text
from wanlora.core.shares import weight_problem
from wanlora.core.text import decode_utf8, shorten, spellings, without_surrogates
from wanlora.data import columns, npz
from wanlora.errors import ManifestError
from wanlora.files import encode_text, existing_spelling, write_atomic

TRANSFORM_REVISION = 1
"""Stands for the pixel rules (which frame is taken, rotation, resize, crop) in every clip key."""
IMAGE_REVISION = 2
"""The same for clips of images."""

TRAIN, VAL = "train", "val"
KINDS = ("video", "npz", "images")

MAX_LINE_BYTES = 2**20
"""Longest line of a manifest; a caption of 512 tokens has about 3 kB."""
MAX_START_S = 1e6
"""Eleven days: later starts are typing errors, and overflow FFmpeg's time stamps at last."""

log = logging.getLogger(__name__)


class BadLine(NamedTuple):
    """A line of a manifest that cannot be used.

    Attributes:
        where: Manifest and number of the line, `train.jsonl:3`.
        message: Reason; starts with `where`.
    """

    where: str
    message: str

    @property
    def reason(self) -> str:
        """Message without `where`, for a list that shows the line's place itself."""
        return self.message.removeprefix(f"{self.where}: ")


OnBad = Callable[[BadLine], object]


def warn(line: BadLine) -> None:
    """Log a bad line."""
    log.warning("%s; the line is not used", line.message)


@dataclass(frozen=True, slots=True)
class Clip:
    """One line of a manifest: where a clip's pixels are, how to cut them, and its captions.

    Attributes:
        clip_id: Unique in a manifest; from the source and the cut, not from the prompt.
        source: Path as written in the line.
        source_sha256: Hash of the source's bytes; None until somebody has read them.
        kind: A video to cut, a clip already cut (npz), or a still image (images).
        source_group: Clips of one group never stand on both sides of the split.
        start_s: Seconds from the source's first frame to the clip's.
        fps: Frames a second of the clip.
        prompts: Captions; the first is the prompt.
        orig: What the source was like (size, fps, duration), for people.
        transform: How frames become pixels of the clip; part of the clip's key.
        path: Absolute path of the source; not written.
        weight: How often the clip is drawn in training, relative to a clip of weight 1; written
            only when it is not 1.
    """

    clip_id: str
    source: str
    source_sha256: str | None
    source_group: str
    kind: Literal["video", "npz", "images"]
    start_s: float
    fps: float
    num_frames: int
    height: int
    width: int
    prompts: tuple[str, ...]
    activity: str
    split: str
    orig: dict[str, Any]
    transform: dict[str, Any]
    warnings: tuple[str, ...]
    path: Path
    weight: float = 1.0

    @property
    def prompt(self) -> str:
        """The first caption."""
        return self.prompts[0]

    @property
    def bucket(self) -> Bucket:
        """Size of the clip; zeros for a plain .npz line whose file could not be read."""
        return Bucket(self.num_frames, self.height, self.width)


def clip_key(clip: Clip, source_sha256: str) -> str:
    """Hex sha256 of everything that decides the pixels of a clip.

    Nothing said about it is hashed, its fps is: of an .npz clip and of an image too, which are the
    same pixels at any, so that another `prepare --fps` encodes those again as well.

    Args:
        clip: The cut.
        source_sha256: Hash of the source's bytes as they are now.
    """
    return fingerprint(
        {
            "source": source_sha256,
            "kind": clip.kind,
            "start_s": clip.start_s,
            "fps": clip.fps,
            "size": list(clip.bucket),
            "transform": clip.transform,
            "revision": IMAGE_REVISION if clip.kind == "images" else TRANSFORM_REVISION,
        }
    )


def written_path(source: Path, folder: Path) -> str:
    """Path of a source as a manifest in `folder` names it; valid from any working directory.

    Relative if both are in one project (`../../videos/walk.mp4`), so a project can be moved as a
    whole; absolute otherwise.
    """
    source, folder = _absolute(source), _absolute(folder)
    near = source.is_relative_to(folder.parent) and folder.parent != Path(folder.anchor)
    if near or _in_one_project(source.parent, folder):
        return Path(os.path.relpath(source, folder)).as_posix()
    return str(source)


@lru_cache(maxsize=1024)
def _in_one_project(first: Path, second: Path) -> bool:
    """Return whether two folders have a parent below the root and the user's home.

    Not if a symbolic link leads to one of them from there: the relative path would differ for
    anybody who comes by the link's target.
    """
    common = Path(os.path.commonpath([first, second]))
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  (Path.home raises without one)
    if common == Path(common.anchor) or home.is_relative_to(common):
        return False
    real = Path(os.path.realpath(common))
    return all(
        real / folder.relative_to(common) == Path(os.path.realpath(folder))
        for folder in (first, second)
    )


def source_path(written: str, folder: Path) -> Path:
    """Absolute path of a source that a manifest in `folder` names."""
    return _absolute(existing_spelling(_absolute(folder / written)))


def write(path: Path, clips: Sequence[Clip]) -> None:
    """Write a manifest whole: a reader or a kill sees the old file or the new one."""
    write_atomic(path, document(clips))


def document(clips: Sequence[Clip]) -> bytes:
    """Bytes of a manifest."""
    return encode_text("".join(f"{line_of(clip)}\n" for clip in clips))


def line_of(clip: Clip) -> str:
    """Line of a clip, without the newline."""
    return json.dumps(_record(clip), ensure_ascii=False)


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
    old = sum(clip.kind == "video" and "matrix" not in clip.orig and _hd(clip) for clip in clips)
    if old:
        log.warning(
            "%d clips of HD videos have lines of wanlora 0.1, which read HD video without a colour "
            "matrix as BT.601 (players: BT.709). Write them again with: wanlora prepare. Then "
            "cache-latents encodes only the clips whose colours change",
            old,
        )


def _hd(clip: Clip) -> bool:
    """Return whether the coded frames have HD size; the size in `orig` is upright."""
    height, width = clip.orig.get("height"), clip.orig.get("width")
    if not (isinstance(height, int) and isinstance(width, int)):
        return False
    return is_hd(width, height) if clip.orig.get("rotation") in (90, 270) else is_hd(height, width)


def files(paths: Sequence[Path]) -> list[Path]:
    """Manifest files of paths; a folder means its train.jsonl and val.jsonl."""
    return [file for path in paths for file in _files(path)]


def _nothing_usable(path: Path, bad: Sequence[BadLine]) -> str:
    if not bad:
        return f"{path} holds no clip; make one with: wanlora prepare VIDEOS"
    lines = units.count(len(bad), "bad line")
    shown = units.first([line.message for line in bad], str(path))
    return "\n".join([f"{path} holds no usable clip; {lines}:", *shown])


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


def parse_line(line: bytes, path: Path, where: str) -> Clip:
    """Read one line.

    Args:
        line: The bytes, UTF-8.
        path: The manifest, for relative paths.
        where: How an error names the line.

    Raises:
        ManifestError: The line cannot be used.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ManifestError(f"{where}: the line has over {MAX_LINE_BYTES:,} bytes")
    try:
        text = decode_utf8(line)
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from None
    row = columns.json_object(text, where)
    own = "source" in row and "kind" in row
    return _own_clip(row, path, where) if own else _plain_clip(row, path, where)


def _own_clip(row: Mapping[str, Any], manifest: Path, where: str) -> Clip:
    """Read a line that `write` wrote; a person may have edited it since."""
    values = {name: _checked(row, name, kinds, where) for name, kinds in _FIELDS.items()}
    if values["kind"] not in KINDS:
        raise ManifestError(
            f"{where}: kind {shorten(values['kind'])}; expected one of {', '.join(KINDS)}"
        )
    for name, (low, high) in _BOUNDS.items():
        if not low <= values[name] <= high:
            raise ManifestError(
                f"{where}: {name} {_shown(values[name])}; expected {low:g} to {high:g}"
            )
    for name in ("clip_id", "source_group", "activity", "split"):
        values[name] = columns.label(values[name], name, where)
    values |= {"start_s": float(values["start_s"]), "fps": float(values["fps"])}
    _require_flat(values["orig"], "orig", where)
    _require_flat(values["transform"], "transform", where)
    _require_aspect(values["transform"], where)
    values["warnings"] = _warnings(row, where)
    source = columns.checked_path(values["source"], where)
    return Clip(
        **values,
        prompts=_captions(row, where),
        path=source_path(source, manifest.parent),
        weight=columns.weight_in(row, f"{where}: clip {values['clip_id']}") or 1.0,
    )


_FIELDS: dict[str, tuple[type, ...]] = {
    "clip_id": (str,),
    "source": (str,),
    "source_sha256": (str, type(None)),
    "source_group": (str,),
    "kind": (str,),
    "start_s": (int, float),
    "fps": (int, float),
    "num_frames": (int,),
    "height": (int,),
    "width": (int,),
    "activity": (str,),
    "split": (str,),
    "orig": (dict,),
    "transform": (dict,),
}


_BOUNDS: dict[str, tuple[float, float]] = {
    "start_s": (0, MAX_START_S),
    "fps": (MIN_FPS, MAX_FPS),
    "num_frames": (0, MAX_FRAMES),
    "height": (0, MAX_SIDE_PX),
    "width": (0, MAX_SIDE_PX),
}

_ASPECT = re.compile(r"[0-9]{1,10}(/[0-9]{1,10}|\.[0-9]{1,10})?")
MAX_ASPECT = 100
"""Widest pixel, and inverse of the narrowest; anamorphic video has at most 3."""


def sample_aspect(transform: Mapping[str, Any]) -> Fraction:
    """Width over height of one pixel of the source, upright.

    Raises:
        ValueError: It is not a number or ratio such as `128/117`, or is out of range.
    """
    value = transform.get("sample_aspect", "1")
    return _aspect(value if isinstance(value, str) else _shown(value))


@lru_cache(maxsize=1024)
def _aspect(text: str) -> Fraction:
    if not _ASPECT.fullmatch(text) or re.search(r"/0+$", text):
        raise ValueError(f'sample_aspect {_shown(text)}; expected a text such as "1" or "128/117"')
    aspect = Fraction(text)
    if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
        raise ValueError(f"sample_aspect {text}; expected 1/{MAX_ASPECT} to {MAX_ASPECT}")
    return aspect


def _require_aspect(transform: Mapping[str, Any], where: str) -> None:
    try:
        sample_aspect(transform)
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from None


def _require_flat(values: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse nested values: they are hashed and compared, and none is ever written."""
    for key, value in values.items():
        if not isinstance(value, str | int | float | None):
            raise ManifestError(
                f"{where}: {name}.{key:.40} is {_shown(value)}; expected text or a number"
            )


def _warnings(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = row.get("warnings", [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ManifestError(f"{where}: warnings is {_shown(found)}; expected a list of texts")
    return tuple(map(without_surrogates, found))


def _checked(row: Mapping[str, Any], name: str, kinds: tuple[type, ...], where: str) -> Any:
    if name not in row:
        raise ManifestError(f"{where}: no {name}; write the manifest again with: wanlora prepare")
    value = row[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ManifestError(f"{where}: {name} is {_shown(value)}; expected {names}")
    return value


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


def _plain_clip(row: Mapping[str, Any], manifest: Path, where: str) -> Clip:
    """Read a line of a plain .npz data set; its size comes from the .npz header.

    A file that is missing or not right gives a size of zeros here, and its MediaError when it is
    loaded, so that one bad file does not hide the others.
    """
    source = columns.path_in(row, where)
    path = _plain_path(source, manifest)
    if path.suffix.lower() != ".npz":
        raise ManifestError(
            f"{where}: {source:.200} is not an .npz clip, and the line has no start and size to "
            f"cut it by; make a manifest with: wanlora prepare VIDEOS --captions {manifest}"
        )
    num_frames, height, width = npz_size(path)
    return Clip(
        clip_id=columns.text_in(row, ("clip_id",), where)
        or f"{path.stem}-{sha256_text(source)[:8]}",
        source=source,
        source_sha256=None,
        source_group=columns.text_in(row, columns.GROUP_NAMES, where) or path.stem,
        kind="npz",
        start_s=0.0,
        fps=DEFAULT_FPS,
        num_frames=num_frames,
        height=height,
        width=width,
        prompts=_captions(row, where),
        activity=columns.text_in(row, columns.ACTIVITY_NAMES, where) or path.parent.name,
        split=columns.split_in(row, where) or columns.SPLITS.get(manifest.stem, TRAIN),
        orig={},
        transform={},
        warnings=(),
        path=path,
        weight=columns.weight_in(row, f"{where}: {source}") or 1.0,
    )


def _plain_path(source: str, manifest: Path) -> Path:
    folder = _absolute(manifest.parent)
    candidates = [
        _absolute(above / name) for above in (folder, *folder.parents) for name in spellings(source)
    ]
    # Path.is_file raises for a path that the system refuses; this is False for it.
    return next((path for path in candidates if os.path.isfile(path)), candidates[0])  # noqa: PTH113


def npz_size(path: Path) -> tuple[int, int, int]:
    """Frames, height and width of an .npz clip; zeros if it cannot be read."""
    try:
        with path.open("rb") as file:
            header = npz.read_header(file)
    except (OSError, ValueError):
        return 0, 0, 0
    if npz.layout_problem(header):
        return 0, 0, 0
    return cast("tuple[int, int, int]", header.shape[:3])


def _captions(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    prompts = columns.captions_in(row, where)
    if not prompts:
        raise ManifestError(
            f"{where}: no caption; expected text under one of {', '.join(columns.CAPTION_NAMES)}, "
            f"found {columns.describe(row)}"
        )
    return prompts


def _record(clip: Clip) -> dict[str, Any]:
    record = {field.name: getattr(clip, field.name) for field in fields(clip)}
    del record["path"]
    record["prompt"] = list(clip.prompts) if len(clip.prompts) > 1 else clip.prompts[0]
    del record["prompts"]
    if clip.weight == 1:
        del record["weight"]
    return record


def _absolute(path: Path) -> Path:
    """Absolute and without `..`, but with symbolic links kept: a link's name may be the clip's."""
    return Path(os.path.abspath(path))  # noqa: PTH100  (Path.resolve follows links)
