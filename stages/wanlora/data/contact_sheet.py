"""The contact sheet: every clip as it will be trained on, and what was left out, on one page.

Owns: which frames are shown and the page. Pixels come from `clips`, markup from `report`.
Dimensions: h height, w width in px.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora.core.aspect import cover_size
from wanlora.core.buckets import MAX_SIDE_PX, MAX_TOKENS
from wanlora.data.clip import Clip, sample_aspect
from wanlora.data.clips import load_clip
from wanlora.data.survey import Plan
from wanlora.errors import MediaError
from wanlora.files import write_text
from wanlora.report.generated import marked
from wanlora.report.page import Keyed, Raw, escape, facts, image, page, section, table

NUM_SHOWN = 3
THUMBNAIL_PX = 112
"""Longest side of a frame on the page."""

QUALITY = 70


@dataclass(frozen=True, slots=True)
class Left:
    """A source or clip that is not used, and why."""

    name: str
    code: str
    message: str


def write(
    path: Path,
    clips: Sequence[Clip],
    left: Iterable[Left],
    plan: Plan,
    token_counts: Mapping[str, int],
    *,
    command: str,
    most: int,
    step: Callable[[], object] = lambda: None,
) -> None:
    """Write the page, whole.

    Args:
        path: The file; its folder is made.
        clips: In the order of the page.
        left: What is not used.
        plan: Its rows stand at the top.
        token_counts: Tokens of every caption.
        command: Name of the command: the title, and the mark of the page.
        most: Maximum number of clips, and of sources not used, on the page: the first ones.
        step: Called after each clip.
    """
    about = "" if plan.captions.tokenizer else "about "
    rows, unshown = [], []
    for clip in clips[:most]:
        try:
            frames = shown_frames(clip)
        except MediaError as error:
            unshown.append(Left(clip.clip_id, error.code, str(error)))
        else:
            tokens = max(token_counts[text] for text in clip.prompts)
            rows.append(_row(clip, frames, tokens, about))
        step()
    dropped = [*left, *unshown]
    headers = (
        "frames", "crop", "clip", "caption", "activity", "tokens", "split", "bucket", "start s",
    )  # fmt: skip
    sections = [
        section("Plan", facts(_joined(plan.rows()))),
        section(f"Clips: {_first(len(rows), len(clips) - len(unshown))}", table(headers, rows)),
        section(
            f"Not used: {_first(min(most, len(dropped)), len(dropped))}",
            _left_table(dropped[:most]),
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, marked(page(f"wanlora {command}", sections), command))


def _first(shown: int, total: int) -> str:
    return f"{total:,}" if shown == total else f"first {shown:,} of {total:,} (html_clips)"


def shown_frames(clip: Clip) -> list[UInt8[np.ndarray, "h w 3"]]:
    """First, middle and last frame of a clip, cropped as the VAE will see them, scaled down."""
    last = clip.num_frames - 1
    picked = sorted({round(k * last / (NUM_SHOWN - 1)) for k in range(NUM_SHOWN)})
    if clip.kind == "npz":
        pixels = load_clip(clip)[picked]
    else:
        starts = [clip.start_s + index / clip.fps for index in picked]
        single = (replace(clip, num_frames=1, start_s=start) for start in starts)
        pixels = torch.cat([load_clip(one) for one in single])
    scale = THUMBNAIL_PX / max(clip.height, clip.width)
    size = (round(clip.height * scale), round(clip.width * scale))
    small = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return list(small.permute(0, 2, 3, 1).numpy())


def crop_box(clip: Clip) -> tuple[int, int, int, int] | None:
    """What a clip keeps of its source, in px of the upright source with square pixels.

    Returns:
        left, top, width, height; None for a clip that is already cut, or whose line has no size.
    """
    width, height = (clip.orig.get(name) for name in ("width", "height"))
    if clip.kind == "npz" or not (_is_size(width) and _is_size(height)):
        return None
    aspect = sample_aspect(clip.transform)
    covered = cover_size(height, width, height=clip.height, width=clip.width, sample_aspect=aspect)
    down, across = height / covered[0], float(width * aspect) / covered[1]
    kept = (round(clip.width * across), round(clip.height * down))
    left, top = (covered[1] - clip.width) // 2 * across, (covered[0] - clip.height) // 2 * down
    return round(left), round(top), *kept


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= MAX_SIDE_PX


def _row(
    clip: Clip, frames: list[UInt8[np.ndarray, "h w 3"]], tokens: int, about: str
) -> list[object]:
    alt = f"{clip.clip_id}: first, middle and last frame"
    strip = "".join(image(frame, alt=alt, quality=QUALITY) for frame in frames)
    warnings = "".join(f'<div class="warn">{escape(text)}</div>' for text in clip.warnings)
    captions = "".join(f"<p>{escape(text)}</p>" for text in clip.prompts)
    mark = "bad" if tokens > MAX_TOKENS else ""
    return [
        Raw(f'<div class="strip">{strip}</div>'),
        _crop_picture(clip),
        Raw(f'<span class="code">{escape(clip.clip_id)}</span>{warnings}'),
        Raw(captions),
        clip.activity,
        Keyed(Raw(f'<span class="{mark}">{about}{tokens}</span>'), tokens),
        clip.split,
        str(clip.bucket),
        round(clip.start_s, 3),
    ]


def _crop_picture(clip: Clip) -> Raw:
    """The source's outline and what is kept of it, drawn to scale."""
    box = crop_box(clip)
    if box is None:
        return Raw("whole")
    left, top, kept_width, kept_height = box
    height = int(clip.orig["height"])
    width = round(int(clip.orig["width"]) * float(sample_aspect(clip.transform)))
    text = f"{kept_width}x{kept_height} at {left},{top} of {width}x{height}"
    longest = max(width, height)
    scale = 64 / longest
    return Raw(
        f'<svg width="{width * scale:.0f}" height="{height * scale:.0f}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{text}">'
        f'<rect width="{width}" height="{height}" fill="currentColor" opacity=".18"/>'
        f'<rect x="{left}" y="{top}" width="{kept_width}" height="{kept_height}" fill="none" '
        f'stroke="currentColor" stroke-width="{longest / 32:.0f}"/></svg>'
        f'<div class="soft">{text}</div>'
    )


def _left_table(left: Sequence[Left]) -> Raw:
    if not left:
        return Raw("<p>nothing</p>")
    return table(("name", "reason", "why"), [[item.name, item.code, item.message] for item in left])


def _joined(rows: Iterable[tuple[str, str]]) -> dict[str, Raw]:
    """Rows of one name under one heading."""
    joined: dict[str, list[str]] = {}
    for name, text in rows:
        joined.setdefault(name, []).append(escape(text))
    return {name: Raw("<br>".join(texts)) for name, texts in joined.items()}
