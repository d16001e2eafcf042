"""Contract 1, the manifest: JSON lines, a clip a line.

Owns: what a line says, and what makes two clips the same. Reads wanlora's own lines and those of
plain .npz data sets (a path and a prompt). Knows nothing of how pixels are decoded.

A relative path is relative to the manifest's folder, never to the working directory. In a line
that wanlora did not write it may also be relative to a folder above (`data/processed/clips/a.npz`
in `data/processed/train.jsonl`): the nearest folder where the file exists counts.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from wanlora.core import npz, rows
from wanlora.core.buckets import Bucket
from wanlora.core.fingerprint import fingerprint, sha256_text
from wanlora.errors import ManifestError
from wanlora.files import write_atomic

TRANSFORM_REVISION = 1
"""Stands for the pixel rules (which frame is taken, rotation, resize, crop) in every clip key."""
IMAGE_REVISION = 2
"""The same for clips of images."""

DEFAULT_FPS = 16.0
TRAIN, VAL = "train", "val"
KINDS = ("video", "npz", "images")

log = logging.getLogger(__name__)


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
    """How a manifest in `folder` names a source: valid whatever the working directory is.

    Relative when the source lies under the manifest's folder or under a folder beside it
    (`../raw/walk.mp4`), so that a data folder can move as a whole; absolute otherwise.
    """
    source, folder = _absolute(source), _absolute(folder)
    near = source.is_relative_to(folder.parent) and folder.parent != Path(folder.anchor)
    return Path(os.path.relpath(source, folder)).as_posix() if near else str(source)


def write(path: Path, clips: Sequence[Clip]) -> None:
    """Write a manifest whole: a reader or a kill sees the old file or the new one."""
    text = "".join(json.dumps(_record(clip), ensure_ascii=False) + "\n" for clip in clips)
    write_atomic(path, text.encode())


def read(path: Path) -> list[Clip]:
    """Read a manifest, wanlora's own lines or plain ones.

    Raises:
        ManifestError: It is missing or empty, a line is bad (`file:line`), or two lines that differ
            name the same clip. Equal lines are one clip, whose weight is the sum of theirs.
    """
    clips: dict[str, Clip] = {}
    for number, row in _rows(path):
        where = f"{path}:{number}"
        own = "source" in row and "kind" in row
        clip = _own_clip(row, path, where) if own else _plain_clip(row, path, where)
        earlier = clips.get(clip.clip_id)
        if earlier is not None:
            clip = _repeated(earlier, clip, where)
        clips[clip.clip_id] = clip
    if not clips:
        raise ManifestError(f"{path} holds no clip; make one with: wanlora prepare VIDEOS")
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
    if problem := rows.weight_problem(weight):
        raise ManifestError(
            f"{where}: the lines of clip {clip.clip_id} have weight {weight:g} in all; {problem}"
        )
    return replace(clip, weight=weight)


def read_all(paths: Sequence[Path]) -> list[Clip]:
    """Read several manifests as one; a folder stands for its train.jsonl and val.jsonl.

    Raises:
        ManifestError: As `read`, or two manifests name the same clip.
    """
    seen: dict[str, Path] = {}
    clips: list[Clip] = []
    for path in (file for given in paths for file in _files(given)):
        for clip in read(path):
            if clip.clip_id in seen:
                raise ManifestError(
                    f"clip {clip.clip_id} stands in {seen[clip.clip_id]} and in {path}; "
                    "a clip belongs to one manifest, or it would be trained on twice"
                )
            seen[clip.clip_id] = path
            clips.append(clip)
    return clips


def _files(given: Path) -> list[Path]:
    if not given.is_dir():
        return [given]
    train, val = given / f"{TRAIN}.jsonl", given / f"{VAL}.jsonl"
    return [path for path in (train, val) if path.exists()] or [train]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ManifestError(
            f"no manifest at {path}; make one with: wanlora prepare VIDEOS"
        ) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ManifestError(f"{path} is not a manifest: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, rows.json_object(line, f"{path}:{number}")


def _own_clip(row: Mapping[str, Any], manifest: Path, where: str) -> Clip:
    """Read a line that `write` wrote; a person may have edited it since."""
    values = {name: _checked(row, name, kinds, where) for name, kinds in _FIELDS.items()}
    if values["kind"] not in KINDS:
        raise ManifestError(f"{where}: kind {values['kind']!r}; expected one of {', '.join(KINDS)}")
    if values["start_s"] < 0 or not 0 < values["fps"] < float("inf"):
        raise ManifestError(
            f"{where}: start_s {values['start_s']}, fps {values['fps']}; "
            "expected start_s >= 0 and fps > 0"
        )
    values |= {"start_s": float(values["start_s"]), "fps": float(values["fps"])}
    values["warnings"] = tuple(map(str, row.get("warnings", ())))
    return Clip(
        **values,
        prompts=_captions(row, where),
        path=_absolute(manifest.parent / values["source"]),
        weight=rows.weight_in(row, f"{where}: clip {values['clip_id']}") or 1.0,
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


def _checked(row: Mapping[str, Any], name: str, kinds: tuple[type, ...], where: str) -> Any:
    if name not in row:
        raise ManifestError(f"{where}: no {name}; write the manifest again with: wanlora prepare")
    value = row[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ManifestError(f"{where}: {name} is {value!r}; expected {names}")
    return value


def _plain_clip(row: Mapping[str, Any], manifest: Path, where: str) -> Clip:
    """Read a line of a plain .npz data set; its size comes from the .npz header.

    A file that is missing or not right gives a size of zeros here, and its MediaError when it is
    loaded, so that one bad file does not hide the others.
    """
    source = rows.path_in(row, where)
    path = _plain_path(source, manifest)
    if path.suffix.lower() != ".npz":
        raise ManifestError(
            f"{where}: {source} is no .npz clip, and the line does not say how to cut it; make a "
            f"manifest from videos with: wanlora prepare VIDEOS --captions {manifest}"
        )
    num_frames, height, width = _npz_size(path)
    return Clip(
        clip_id=str(row.get("clip_id") or f"{path.stem}-{sha256_text(source)[:8]}"),
        source=source,
        source_sha256=None,
        source_group=rows.text_in(row, rows.GROUP_NAMES, where) or path.stem,
        kind="npz",
        start_s=0.0,
        fps=DEFAULT_FPS,
        num_frames=num_frames,
        height=height,
        width=width,
        prompts=_captions(row, where),
        activity=rows.text_in(row, rows.ACTIVITY_NAMES, where) or path.parent.name,
        split=rows.split_in(row, where) or rows.SPLITS.get(manifest.stem, TRAIN),
        orig={},
        transform={},
        warnings=(),
        path=path,
        weight=rows.weight_in(row, f"{where}: {source}") or 1.0,
    )


def _plain_path(source: str, manifest: Path) -> Path:
    folder = _absolute(manifest.parent)
    candidates = [_absolute(above / source) for above in (folder, *folder.parents)]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _npz_size(path: Path) -> tuple[int, int, int]:
    try:
        with path.open("rb") as file:
            header = npz.read_header(file)
    except (OSError, ValueError):
        return 0, 0, 0
    if npz.layout_problem(header):
        return 0, 0, 0
    return cast("tuple[int, int, int]", header.shape[:3])


def _captions(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    prompts = rows.captions_in(row, where)
    if not prompts:
        raise ManifestError(
            f"{where}: no caption; expected text under one of {', '.join(rows.CAPTION_NAMES)}"
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
