"""The stage: find, check, cut, split, write.

Owns: the order of the steps and the rules for which video is refused. Decoding is media's, captions
are captions', cutting is cuts'.
"""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanlora import manifest
from wanlora.captions import Failure, Found, Source, find
from wanlora.config import PrepareConfig
from wanlora.errors import ConfigError, ManifestError, MediaError
from wanlora.files import fsync_dir, write_atomic
from wanlora.manifest import Clip
from wanlora.media.decode import num_outputs
from wanlora.media.probe import Scan
from wanlora.prepare.check import Checked, check_all
from wanlora.prepare.cuts import cuts, held_out, unique_ids
from wanlora.prepare.result import PrepareResult, counts, summarize
from wanlora.progress import bar

FPS_SLACK = 0.01
"""23.976 counts as 24 and 15.99 as 16, with a warning: one frame in a hundred or fewer repeats."""

LARGE_UPSCALE = 1.5


def run(config: PrepareConfig) -> PrepareResult:
    """Make a manifest.

    Raises:
        ManifestError: No video, no caption, or not a single clip; errors.jsonl then says why.
        ConfigError: group_pattern is no regular expression with a group.
    """
    pattern = _compile(config.group_pattern)
    found = find(config.sources, config.captions)
    clips, failures, video_s = _clips_of_all(found, config, pattern)
    failures = sorted(
        [*found.failures, *failures], key=lambda failure: (failure.path, failure.code)
    )
    config.output.mkdir(parents=True, exist_ok=True)
    _write_errors(config.output / "errors.jsonl", failures)
    if not clips:
        raise ManifestError(
            f"not one clip from {len(found.sources)} sources: "
            f"{counts(Counter(failure.code for failure in failures))}; "
            f"{config.output / 'errors.jsonl'} says why for each"
        )
    clips = _split(clips, config)
    _write_manifests(config.output, clips)
    return summarize(config, found, clips, failures, video_s)


def _clips_of_all(
    found: Found, config: PrepareConfig, pattern: re.Pattern[str] | None
) -> tuple[list[Clip], list[Failure], float]:
    """Check and cut every source; the outcome does not depend on which was ready first."""
    outcomes: dict[Path, Checked | MediaError] = {}
    paths = [source.path for source in found.sources]
    with bar(total=len(paths), description="checking", unit="video") as progress:
        for path, outcome in check_all(paths, workers=config.workers):
            outcomes[path] = outcome
            progress.update(1)
    clips: list[Clip] = []
    failures: list[Failure] = []
    video_s = 0.0
    first_with: dict[str, Path] = {}
    for source in found.sources:
        try:
            checked = outcomes[source.path]
            if isinstance(checked, MediaError):
                raise checked
            cut = _cut_source(source, checked, config, pattern)
        except MediaError as error:
            failures.append(Failure(error.code, str(error), str(source.path)))
            continue
        twin = first_with.setdefault(checked.sha256, source.path)
        clips += (
            [_warn(clip, f"duplicate: same bytes as {twin}") for clip in cut]
            if (twin != source.path)
            else cut
        )
        video_s += _length_s(checked, config)
    ids = unique_ids([clip.clip_id for clip in clips])
    return [replace(c, clip_id=i) for c, i in zip(clips, ids, strict=True)], failures, video_s


def _cut_source(
    source: Source, checked: Checked, config: PrepareConfig, pattern: re.Pattern[str] | None
) -> list[Clip]:
    """Make the clips of one source.

    Raises:
        MediaError: hdr, low_fps or too_short.
    """
    if not isinstance(checked.content, Scan):
        return [_npz_clip(source, checked, config, pattern)]
    scan = checked.content
    _require_usable(source.path, scan, config)
    available = num_outputs(scan.span_s, config.fps)
    found = cuts(
        available,
        num_frames=config.num_frames,
        fps=config.fps,
        mode=config.mode,
        short=config.short,
        min_frames=config.min_frames,
    )
    if not found:
        shortest = config.num_frames if config.short == "drop" else config.min_frames
        raise MediaError(
            "too_short",
            f"{source.path}: {available} frames at {config.fps:g} fps ({scan.span_s:.2f} s); "
            f"expected at least {shortest}",
        )
    warnings = _warnings(scan, found[0].num_frames, config)
    return [
        Clip(
            clip_id=_clip_id(source.path, checked.sha256, cut.start_s),
            source=manifest.written_path(source.path, config.output),
            source_sha256=checked.sha256,
            source_group=source.group or checked.sha256[:16],
            kind="video",
            start_s=cut.start_s,
            fps=config.fps,
            num_frames=cut.num_frames,
            height=config.height,
            width=config.width,
            prompts=source.prompts,
            activity=source.activity,
            split=manifest.TRAIN,
            orig=_orig(scan),
            transform={
                "resize": "bicubic-antialias",
                "crop": "center",
                "sample_aspect": str(scan.info.sample_aspect),
            },
            warnings=warnings,
            path=source.path,
        )
        for cut in found
    ]


def _npz_clip(
    source: Source, checked: Checked, config: PrepareConfig, pattern: re.Pattern[str] | None
) -> Clip:
    """Take a clip that is already cut as it is: its size is its own."""
    assert not isinstance(checked.content, Scan)
    num_frames, height, width = checked.content
    match = pattern.search(source.path.stem) if pattern else None
    return Clip(
        clip_id=_clip_id(source.path, checked.sha256, 0.0),
        source=manifest.written_path(source.path, config.output),
        source_sha256=checked.sha256,
        source_group=source.group or (match.group(1) if match else checked.sha256[:16]),
        kind="npz",
        start_s=0.0,
        fps=config.fps,
        num_frames=num_frames,
        height=height,
        width=width,
        prompts=source.prompts,
        activity=source.activity,
        split=manifest.TRAIN,
        orig={},
        transform={},
        warnings=() if source.group or match else ("no_group: other clips of its video unknown",),
        path=source.path,
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


def _warnings(scan: Scan, num_frames: int, config: PrepareConfig) -> tuple[str, ...]:
    """What a person may want to know about a clip that is used all the same, `kind: detail`."""
    warnings = []
    if num_frames < config.num_frames:
        warnings.append(
            f"trimmed: {num_frames} of {config.num_frames} frames, it lasts {scan.span_s:.2f} s"
        )
    if scan.fps < config.fps:
        warnings.append(f"low_fps: frames repeat, {scan.fps:.3f} of {config.fps:g} a second")
    elif scan.longest_gap_s > 2 / config.fps:
        warnings.append(f"gap: frames repeat, the longest stands {scan.longest_gap_s:.3f} s")
    displayed_width = scan.info.width * scan.info.sample_aspect
    upscale = max(config.height / scan.info.height, float(config.width / displayed_width))
    if upscale > LARGE_UPSCALE:
        warnings.append(f"upscaled: {upscale:.1f} times from {scan.info.width}x{scan.info.height}")
    if scan.info.interlaced:
        warnings.append("interlaced: fields are not separated")
    if scan.info.hdr:
        warnings.append(f"hdr: {scan.info.hdr}, not tone-mapped")
    return tuple(warnings)


def _orig(scan: Scan) -> dict[str, Any]:
    return {
        "width": scan.info.width,
        "height": scan.info.height,
        "fps": round(scan.fps, 6),
        "num_frames": scan.num_frames,
        "duration_s": round(scan.span_s, 6),
        "codec": scan.info.codec,
        "rotation": 90 * scan.info.rotation,
    }


def _clip_id(path: Path, sha256: str, start_s: float) -> str:
    """Name for people, then what makes it stable: the source's bytes and the start in ms."""
    stem = re.sub(r"[^\w.-]+", "-", path.stem)
    return f"{stem}-{sha256[:8]}-{round(start_s * 1000):06d}"


def _length_s(checked: Checked, config: PrepareConfig) -> float:
    if isinstance(checked.content, Scan):
        return checked.content.span_s
    return checked.content.num_frames / config.fps


def _warn(clip: Clip, warning: str) -> Clip:
    return replace(clip, warnings=(*clip.warnings, warning))


def _split(clips: list[Clip], config: PrepareConfig) -> list[Clip]:
    activity_of: dict[str, str] = {}
    for clip in clips:
        activity_of.setdefault(clip.source_group, clip.activity)
    val = held_out(activity_of, val_fraction=config.val_fraction, seed=config.seed)
    return [
        replace(clip, split=manifest.VAL if clip.source_group in val else manifest.TRAIN)
        for clip in clips
    ]


def _write_manifests(output: Path, clips: list[Clip]) -> None:
    """Write both; a kill in between leaves a train.jsonl that can stand alone."""
    parts = {
        split: [clip for clip in clips if clip.split == split]
        for split in (manifest.TRAIN, manifest.VAL)
    }
    (output / "val.jsonl").unlink(missing_ok=True)
    fsync_dir(output)
    manifest.write(output / "train.jsonl", parts[manifest.TRAIN])
    if parts[manifest.VAL]:
        manifest.write(output / "val.jsonl", parts[manifest.VAL])


def _write_errors(path: Path, failures: list[Failure]) -> None:
    records = [
        {"code": failure.code, "stage": "prepare", "message": failure.message, "path": failure.path}
        for failure in failures
    ]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomic(path, text.encode())


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"group_pattern {pattern!r} is no regular expression: {error}") from None
    if compiled.groups < 1:
        raise ConfigError(
            f"group_pattern {pattern!r} has no group; put ( ) around the video's name"
        )
    return compiled
