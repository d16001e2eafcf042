"""Make the clips of a checked source.

Owns: the refusal of sources, and the warnings, size, name and record of a clip.
Must not know: the positions of cuts (`cuts`), settings of the command.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from wanlora.commands.prepare.check import Checked
from wanlora.commands.prepare.cuts import Cut, Rules, Scene, cuts, shortest
from wanlora.core.aspect import cover_problem, nearest_size
from wanlora.core.buckets import Bucket
from wanlora.data.captions import Source
from wanlora.data.clip import TRAIN, Clip
from wanlora.data.source_paths import written_path
from wanlora.errors import MediaError
from wanlora.media.image import Picture
from wanlora.media.probe import Scan
from wanlora.media.scenes import Detector
from wanlora.media.timeline import COARSE, Repeats, count_repeats

FPS_SLACK = 0.01
"""Tolerance of the frame rate: 23.976 counts as 24 and 15.99 as 16, with a warning, as at most one
frame in a hundred repeats."""

LARGE_UPSCALE = 1.5
LARGE_CROP = 0.3
"""Share of the frame that may be cropped without a warning. In 832x480, 4:3 loses 23 %, a square
42 % and portrait video 67 %."""

MAX_REPEATED = 0.1
"""Share of a clip's steps that may show the same frame again without a warning."""


@dataclass(frozen=True, slots=True)
class ClipRules:
    """Rules that turn sources into clips.

    Attributes:
        cut: Rules for the cuts of videos.
        height: Height of a clip in px.
        width: Width of a clip in px.
        keep_aspect: Keep the proportions of each source; height x width is then the largest area.
        cross_scenes: Clips may cross scene cuts.
        detector: Detector of scene cuts.
        allow_hdr: Accept HDR video.
        allow_low_fps: Accept video with fewer frames per second than a clip.
        caption_prefix: Words put before captions that do not start with them.
        group_pattern: Its first group names the source group of an .npz clip, by the file's stem.
        folder: Folder of the manifest; it is the start of relative paths of sources.
    """

    cut: Rules
    height: int
    width: int
    keep_aspect: bool
    cross_scenes: bool
    detector: Detector
    allow_hdr: bool
    allow_low_fps: bool
    caption_prefix: str
    group_pattern: re.Pattern[str] | None
    folder: Path

    def __str__(self) -> str:
        cut = self.cut
        return f"{cut.num_frames} frames, {self.height}x{self.width} px, at {cut.fps:g} fps"


def clips_of(source: Source, checked: Checked, rules: ClipRules) -> list[Clip]:
    """Make the clips of one source.

    Raises:
        MediaError: hdr, low_fps, too_short or bad_size.
    """
    content = checked.content
    if isinstance(content, Bucket):
        return [_npz_clip(source, checked.sha256, content, rules)]
    if isinstance(content, Picture):
        return [_image_clip(source, checked.sha256, content, rules)]
    _require_usable(source.path, content, rules)
    scenes = _scenes_of(content, rules)
    found = cuts(scenes, rules.cut)
    if not found:
        raise _too_short(source.path, content, scenes, rules.cut)
    return [_video_clip(source, checked.sha256, content, cut, rules) for cut in found]


def _scenes_of(scan: Scan, rules: ClipRules) -> list[Scene]:
    """Parts of a video without a cut; the whole video if clips may cross cuts."""
    inner = () if rules.cross_scenes else scan.cuts_s
    return [Scene(*part) for part in scan.timeline.parts(inner, rules.cut.fps)]


def _video_clip(source: Source, sha256: str, scan: Scan, cut: Cut, rules: ClipRules) -> Clip:
    info = scan.info
    height, width = _size(source.path, info.width, info.height, info.sample_aspect, rules)
    repeats = _count_repeats(scan, cut, rules.cut.fps)
    return Clip(
        clip_id=_clip_id(source.path, sha256, cut.start_s),
        source=written_path(source.path, rules.folder),
        source_sha256=sha256,
        source_group=source.group or sha256[:16],
        kind="video",
        start_s=cut.start_s,
        fps=rules.cut.fps,
        num_frames=cut.num_frames,
        height=height,
        width=width,
        prompts=_prompts(source, rules),
        activity=source.activity,
        split=TRAIN,
        orig={**_orig(scan), "repeated_frames": repeats.repeated},
        transform=_transform(scan),
        warnings=_warnings(scan, cut, repeats, height, width, rules),
        path=source.path,
        weight=source.weight,
    )


def _image_clip(source: Source, sha256: str, picture: Picture, rules: ClipRules) -> Clip:
    """A still image is a clip of one frame."""
    height, width = _size(source.path, picture.width, picture.height, Fraction(1), rules)
    warnings = _upscaled(picture.width, picture.height, Fraction(1), height, width)
    warnings += _cropped(Fraction(picture.width), picture.height, height, width, rules)
    warnings += ["alpha: transparent parts become white"] if picture.alpha else []
    return Clip(
        clip_id=_clip_id(source.path, sha256, 0.0),
        source=written_path(source.path, rules.folder),
        source_sha256=sha256,
        source_group=source.group or sha256[:16],
        kind="images",
        start_s=0.0,
        fps=rules.cut.fps,
        num_frames=1,
        height=height,
        width=width,
        prompts=_prompts(source, rules),
        activity=source.activity,
        split=TRAIN,
        orig={"width": picture.width, "height": picture.height},
        transform={"resize": "bicubic-antialias", "crop": "center", "sample_aspect": "1"},
        warnings=tuple(warnings),
        path=source.path,
        weight=source.weight,
    )


def _npz_clip(
    source: Source,
    sha256: str,
    bucket: Bucket,
    rules: ClipRules,
) -> Clip:
    """Use a clip that is already cut unchanged, with its own size."""
    pattern = rules.group_pattern
    match = pattern.search(source.path.stem) if pattern else None
    return Clip(
        clip_id=_clip_id(source.path, sha256, 0.0),
        source=written_path(source.path, rules.folder),
        source_sha256=sha256,
        source_group=source.group or (match.group(1) if match else sha256[:16]),
        kind="npz",
        start_s=0.0,
        fps=rules.cut.fps,
        num_frames=bucket.num_frames,
        height=bucket.height,
        width=bucket.width,
        prompts=_prompts(source, rules),
        activity=source.activity,
        split=TRAIN,
        orig={},
        transform={},
        warnings=() if source.group or match else ("no_group: other clips of its video unknown",),
        path=source.path,
        weight=source.weight,
    )


def _require_usable(path: Path, scan: Scan, rules: ClipRules) -> None:
    if scan.info.hdr and not rules.allow_hdr:
        raise MediaError(
            "hdr",
            f"{path} is HDR, {scan.info.hdr}; wanlora has no tone mapping, so it would look flat: "
            "convert it to BT.709, or use it unchanged with --set allow_hdr=true",
        )
    if scan.fps < rules.cut.fps * (1 - FPS_SLACK) and not rules.allow_low_fps:
        raise MediaError(
            "low_fps",
            f"{path} has {scan.fps:.3f} frames a second; expected at least {rules.cut.fps:g}, or "
            "frames would repeat: lower --fps, or take it with --set allow_low_fps=true",
        )


def _too_short(path: Path, scan: Scan, scenes: Sequence[Scene], rules: Rules) -> MediaError:
    longest = max(scene.available for scene in scenes)
    part = f"the longest of its {len(scenes)} scenes has" if len(scenes) > 1 else "it has"
    return MediaError(
        "too_short",
        f"{path} lasts {scan.span_s:.2f} s; {part} {longest} frames at {rules.fps:g} fps; "
        f"expected at least {shortest(rules)}",
    )


def _size(
    path: Path, width: int, height: int, sample_aspect: Fraction, rules: ClipRules
) -> tuple[int, int]:
    """Height and width of the clips of a picture.

    Raises:
        MediaError: bad_size, if a picture is too long and narrow to be scaled.
    """
    size = rules.height, rules.width
    if rules.keep_aspect:
        size = nearest_size(width * sample_aspect, height, area=rules.height * rules.width)
    if problem := cover_problem(
        height, width, height=size[0], width=size[1], sample_aspect=sample_aspect
    ):
        raise MediaError("bad_size", f"{path}: {problem}")
    return size


def _transform(scan: Scan) -> dict[str, str]:
    """Rules that convert frames to pixels; rules for special files only if they apply."""
    rules = {
        "resize": "bicubic-antialias",
        "crop": "center",
        "sample_aspect": str(scan.info.sample_aspect),
    }
    if scan.info.assumed_matrix:
        rules["matrix"] = scan.info.assumed_matrix
    if scan.timeline.coarse:
        rules["timestamps"] = COARSE
    return rules


def _count_repeats(scan: Scan, cut: Cut, fps: float) -> Repeats:
    shown = scan.timeline.shown(start_s=cut.start_s, fps=fps, num_frames=cut.num_frames)
    return count_repeats(shown)


def _prompts(source: Source, rules: ClipRules) -> tuple[str, ...]:
    """Captions with the trigger words in front, without repeats."""
    prefix = rules.caption_prefix
    return tuple(
        dict.fromkeys(
            text if not prefix or text.startswith(prefix) else f"{prefix} {text}"
            for text in source.prompts
        )
    )


def _warnings(
    scan: Scan, cut: Cut, repeats: Repeats, height: int, width: int, rules: ClipRules
) -> tuple[str, ...]:
    """Warnings about a usable clip, each `kind: detail`."""
    info = scan.info
    end_s = cut.start_s + cut.num_frames / rules.cut.fps
    crossed = [f"{at:.2f} s" for at in scan.cuts_s if cut.start_s < at < end_s]
    warnings = []
    if cut.num_frames < rules.cut.num_frames:
        frames = f"{cut.num_frames} of {rules.cut.num_frames} frames"
        warnings.append(f"trimmed: {frames}, it lasts {scan.span_s:.2f} s")
    if crossed:
        warnings.append(f"scene_cut: inside the clip, at {', '.join(crossed)} of the video")
    if scan.fps < rules.cut.fps:
        warnings.append(f"low_fps: frames repeat, {scan.fps:.3f} of {rules.cut.fps:g} a second")
    elif repeats.longest > 2:
        held_s = repeats.longest / rules.cut.fps
        warnings.append(
            f"gap: one frame fills {repeats.longest} frames of the clip, {held_s:.2f} s"
        )
    if repeats.repeated > MAX_REPEATED * (cut.num_frames - 1):
        warnings.append(
            f"repeated: {repeats.repeated} of {cut.num_frames} frames show the one before"
        )
    warnings += _upscaled(info.width, info.height, info.sample_aspect, height, width)
    warnings += _cropped(info.width * info.sample_aspect, info.height, height, width, rules)
    if info.interlaced:
        warnings.append("interlaced: fields are not separated")
    if info.hdr:
        warnings.append(f"hdr: {info.hdr}, not tone-mapped")
    return tuple(warnings)


def _upscaled(
    source_width: int, source_height: int, sample_aspect: Fraction, height: int, width: int
) -> list[str]:
    factor = max(height / source_height, float(width / (source_width * sample_aspect)))
    if factor <= LARGE_UPSCALE:
        return []
    return [f"upscaled: {factor:.1f} times from {source_width}x{source_height}"]


def _cropped(
    display_width: Fraction, display_height: int, height: int, width: int, rules: ClipRules
) -> list[str]:
    """Warn if the crop to the clip's proportions loses much of the source."""
    shown, wanted = display_width / display_height, Fraction(width, height)
    kept = float(min(shown, wanted) / max(shown, wanted))
    if kept >= 1 - LARGE_CROP:
        return []
    remedy = "" if rules.keep_aspect else "; --buckets keeps its aspect"
    return [f"cropped: {kept:.0%} of the frame is kept{remedy}"]


def _orig(scan: Scan) -> dict[str, Any]:
    return {
        "width": scan.info.width,
        "height": scan.info.height,
        "fps": round(scan.fps, 6),
        "num_frames": scan.num_frames,
        "duration_s": round(scan.span_s, 6),
        "codec": scan.info.codec,
        "matrix": scan.info.matrix,
        "rotation": 90 * scan.info.rotation,
    }


def _clip_id(path: Path, sha256: str, start_s: float) -> str:
    """Readable name, followed by a hash of the source's bytes and the start in ms."""
    stem = re.sub(r"[^\w.-]+", "-", path.stem)
    return f"{stem}-{sha256[:8]}-{round(start_s * 1000):06d}"
