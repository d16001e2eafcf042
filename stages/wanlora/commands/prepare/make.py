"""From a checked source to its clips.

Owns: which source is refused, which warnings a clip carries, its size, name and record. Where a
video is cut stands in `cuts`.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from wanlora.commands.prepare.check import Checked
from wanlora.commands.prepare.cuts import Cut, Rules, Scene, cuts
from wanlora.config import PrepareConfig
from wanlora.core.aspect import LENGTH_STEP, cover_problem, nearest_size
from wanlora.core.buckets import TEMPORAL_FACTOR, Bucket
from wanlora.data.captions import Source
from wanlora.data.clip import TRAIN, Clip
from wanlora.data.source_paths import written_path
from wanlora.errors import MediaError
from wanlora.media.image import Picture
from wanlora.media.probe import Scan
from wanlora.media.timeline import COARSE, Repeats, count_repeats

FPS_SLACK = 0.01
"""23.976 counts as 24 and 15.99 as 16, with a warning: one frame in a hundred or fewer repeats."""

LARGE_UPSCALE = 1.5
LARGE_CROP = 0.3
"""Share of the frame: 4:3 into 832x480 loses 23 %, a square 42 %, portrait video 67 %."""

MAX_REPEATED = 0.1
"""Share of a clip's steps that may show the same frame again without a warning."""


def clips_of(
    source: Source, checked: Checked, config: PrepareConfig, pattern: re.Pattern[str] | None
) -> list[Clip]:
    """Make the clips of one source.

    Raises:
        MediaError: hdr, low_fps, too_short or bad_size.
    """
    content = checked.content
    if isinstance(content, Bucket):
        return [_npz_clip(source, checked.sha256, content, config, pattern)]
    if isinstance(content, Picture):
        return [_image_clip(source, checked.sha256, content, config)]
    _require_usable(source.path, content, config)
    scenes = scenes_of(content, config)
    found = cuts(scenes, rules_of(config))
    if not found:
        raise _too_short(source.path, content, scenes, config)
    return [_video_clip(source, checked.sha256, content, cut, config) for cut in found]


def rules_of(config: PrepareConfig) -> Rules:
    """What the settings say about cutting."""
    step = LENGTH_STEP if config.buckets else TEMPORAL_FACTOR
    return Rules(
        num_frames=config.num_frames,
        fps=config.fps,
        mode=config.mode,
        stride=config.stride or max(1, config.num_frames // 2),
        count=config.count,
        short=config.short,
        min_frames=config.min_frames,
        lengths=config.lengths or range(1, config.num_frames + 1, step),
    )


def scenes_of(scan: Scan, config: PrepareConfig) -> list[Scene]:
    """Parts of a video without a cut; all of it when clips may cross cuts."""
    inner = () if config.scenes == "allow" else scan.cuts_s
    return [Scene(*part) for part in scan.timeline.parts(inner, config.fps)]


def _video_clip(source: Source, sha256: str, scan: Scan, cut: Cut, config: PrepareConfig) -> Clip:
    info = scan.info
    height, width = _size(source.path, info.width, info.height, info.sample_aspect, config)
    repeats = _count_repeats(scan, cut, config.fps)
    return Clip(
        clip_id=_clip_id(source.path, sha256, cut.start_s),
        source=written_path(source.path, config.output),
        source_sha256=sha256,
        source_group=source.group or sha256[:16],
        kind="video",
        start_s=cut.start_s,
        fps=config.fps,
        num_frames=cut.num_frames,
        height=height,
        width=width,
        prompts=_prompts(source, config),
        activity=source.activity,
        split=TRAIN,
        orig={**_orig(scan), "repeated_frames": repeats.repeated},
        transform=_transform(scan),
        warnings=_warnings(scan, cut, repeats, height, width, config),
        path=source.path,
        weight=source.weight,
    )


def _image_clip(source: Source, sha256: str, picture: Picture, config: PrepareConfig) -> Clip:
    """A still image is a clip of one frame."""
    height, width = _size(source.path, picture.width, picture.height, Fraction(1), config)
    warnings = _upscaled(picture.width, picture.height, Fraction(1), height, width)
    warnings += _cropped(Fraction(picture.width), picture.height, height, width, config)
    warnings += ["alpha: transparent parts become white"] if picture.alpha else []
    return Clip(
        clip_id=_clip_id(source.path, sha256, 0.0),
        source=written_path(source.path, config.output),
        source_sha256=sha256,
        source_group=source.group or sha256[:16],
        kind="images",
        start_s=0.0,
        fps=config.fps,
        num_frames=1,
        height=height,
        width=width,
        prompts=_prompts(source, config),
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
    config: PrepareConfig,
    pattern: re.Pattern[str] | None,
) -> Clip:
    """Take a clip that is already cut as it is: its size is its own."""
    match = pattern.search(source.path.stem) if pattern else None
    return Clip(
        clip_id=_clip_id(source.path, sha256, 0.0),
        source=written_path(source.path, config.output),
        source_sha256=sha256,
        source_group=source.group or (match.group(1) if match else sha256[:16]),
        kind="npz",
        start_s=0.0,
        fps=config.fps,
        num_frames=bucket.num_frames,
        height=bucket.height,
        width=bucket.width,
        prompts=_prompts(source, config),
        activity=source.activity,
        split=TRAIN,
        orig={},
        transform={},
        warnings=() if source.group or match else ("no_group: other clips of its video unknown",),
        path=source.path,
        weight=source.weight,
    )


def _require_usable(path: Path, scan: Scan, config: PrepareConfig) -> None:
    if scan.info.hdr and not config.allow_hdr:
        raise MediaError(
            "hdr",
            f"{path} is HDR, {scan.info.hdr}; nothing here tone-maps it and it would look flat: "
            "convert it to BT.709, or take it as it is with --set allow_hdr=true",
        )
    if scan.fps < config.fps * (1 - FPS_SLACK) and not config.allow_low_fps:
        raise MediaError(
            "low_fps",
            f"{path} has {scan.fps:.3f} frames a second; expected at least {config.fps:g}, or "
            "frames would repeat: lower --fps, or take it with --set allow_low_fps=true",
        )


def _too_short(
    path: Path, scan: Scan, scenes: Sequence[Scene], config: PrepareConfig
) -> MediaError:
    trimmed = min(config.lengths, default=config.min_frames)
    least = config.num_frames if config.short == "drop" else trimmed
    shortest = min(config.num_frames, least)
    longest = max(scene.available for scene in scenes)
    part = f"the longest of its {len(scenes)} scenes has" if len(scenes) > 1 else "it has"
    return MediaError(
        "too_short",
        f"{path} lasts {scan.span_s:.2f} s; {part} {longest} frames at {config.fps:g} fps; "
        f"expected at least {shortest}",
    )


def _size(
    path: Path, width: int, height: int, sample_aspect: Fraction, config: PrepareConfig
) -> tuple[int, int]:
    """Height and width of the clips of a picture.

    Raises:
        MediaError: bad_size, for a picture too long and narrow to be scaled.
    """
    size = config.height, config.width
    if config.buckets:
        size = nearest_size(width * sample_aspect, height, area=config.height * config.width)
    if problem := cover_problem(
        height, width, height=size[0], width=size[1], sample_aspect=sample_aspect
    ):
        raise MediaError("bad_size", f"{path}: {problem}")
    return size


def _transform(scan: Scan) -> dict[str, str]:
    """How frames become pixels; a field that changes pixels is there only if it does."""
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


def _prompts(source: Source, config: PrepareConfig) -> tuple[str, ...]:
    """Captions with the trigger words in front; two that become equal are one."""
    prefix = config.caption_prefix.strip()
    return tuple(
        dict.fromkeys(
            text if not prefix or text.startswith(prefix) else f"{prefix} {text}"
            for text in source.prompts
        )
    )


def _warnings(
    scan: Scan, cut: Cut, repeats: Repeats, height: int, width: int, config: PrepareConfig
) -> tuple[str, ...]:
    """Warnings about a clip that is used anyway, `kind: detail`."""
    info = scan.info
    end_s = cut.start_s + cut.num_frames / config.fps
    crossed = [f"{at:.2f} s" for at in scan.cuts_s if cut.start_s < at < end_s]
    warnings = []
    if cut.num_frames < config.num_frames:
        warnings.append(
            f"trimmed: {cut.num_frames} of {config.num_frames} frames, it lasts {scan.span_s:.2f} s"
        )
    if crossed:
        warnings.append(f"scene_cut: inside the clip, at {', '.join(crossed)} of the video")
    if scan.fps < config.fps:
        warnings.append(f"low_fps: frames repeat, {scan.fps:.3f} of {config.fps:g} a second")
    elif repeats.longest > 2:
        held_s = repeats.longest / config.fps
        warnings.append(
            f"gap: one frame fills {repeats.longest} frames of the clip, {held_s:.2f} s"
        )
    if repeats.repeated > MAX_REPEATED * (cut.num_frames - 1):
        warnings.append(
            f"repeated: {repeats.repeated} of {cut.num_frames} frames show the one before"
        )
    warnings += _upscaled(info.width, info.height, info.sample_aspect, height, width)
    warnings += _cropped(info.width * info.sample_aspect, info.height, height, width, config)
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
    display_width: Fraction, display_height: int, height: int, width: int, config: PrepareConfig
) -> list[str]:
    """Warn when the clip's proportions are far from the source's: the centre alone is kept."""
    shown, wanted = display_width / display_height, Fraction(width, height)
    kept = float(min(shown, wanted) / max(shown, wanted))
    if kept >= 1 - LARGE_CROP:
        return []
    remedy = "" if config.buckets else "; --buckets keeps its aspect"
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
    """Name for people, then what makes it stable: the source's bytes and the start in ms."""
    stem = re.sub(r"[^\w.-]+", "-", path.stem)
    return f"{stem}-{sha256[:8]}-{round(start_s * 1000):06d}"
