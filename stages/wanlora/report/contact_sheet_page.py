"""The contact sheet: a row per clip as it will be trained on, the plan, and what is not used.

Owns: the columns and their markup. Must not know: how frames, crops and token counts are found.
Dimensions: h height, w width in px.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from wanlora.core.buckets import MAX_TOKENS
from wanlora.report.page import Keyed, Raw, escape, facts, image, page, section, table

HEADERS = (
    "frames", "crop", "clip", "caption", "activity", "tokens", "split", "bucket", "start s",
)  # fmt: skip
QUALITY = 70
CROP_PX = 64
"""Longest side of the drawing of a crop."""


@dataclass(frozen=True, slots=True)
class Left:
    """A source or clip that is not used, and why."""

    name: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Crop:
    """The part of a source that a clip keeps, in px of the upright source with square pixels.

    Attributes:
        source: Width and height of the source.
        box: Left, top, width and height of the part.
    """

    source: tuple[int, int]
    box: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Row:
    """A clip.

    Attributes:
        strip: From `frame_strip`.
        crop: None = the whole source.
        name: Id of the clip.
        warnings: Warnings about it.
        captions: All its captions.
        activity: As in the manifest.
        tokens: Number of tokens of its longest caption.
        split: As in the manifest.
        bucket: Frames, height and width, as text.
        start_s: Start in the source, in seconds.
    """

    strip: Raw
    crop: Crop | None
    name: str
    warnings: Sequence[str]
    captions: Sequence[str]
    activity: str
    tokens: int
    split: str
    bucket: str
    start_s: float


def contact_sheet_page(
    title: str,
    plan: Iterable[tuple[str, str]],
    rows: Sequence[Row],
    num_clips: int,
    left: Sequence[Left],
    *,
    exact_tokens: bool,
    most: int,
) -> str:
    """Build the page.

    Args:
        title: At the top.
        plan: Name and text of each line of the plan.
        rows: The clips that are shown.
        num_clips: Number of clips, with those that are not shown.
        left: All sources and clips that are not used.
        exact_tokens: The tokens were counted by the model's tokenizer.
        most: Maximum number of `left` on the page.
    """
    shown = left[:most]
    unused = [[item.name, item.code, item.message] for item in shown]
    sections = [
        section("Plan", facts(_joined(plan))),
        section(
            f"Clips: {_first(len(rows), num_clips)}",
            table(HEADERS, [_cells(row, exact_tokens=exact_tokens) for row in rows]),
        ),
        section(
            f"Not used: {_first(len(shown), len(left))}",
            table(("name", "reason", "why"), unused) if unused else "nothing",
        ),
    ]
    return page(title, sections)


def frame_strip(frames: Sequence[UInt8[np.ndarray, "h w 3"]], name: str) -> Raw:
    """Encode the first, middle and last frame of a clip, cropped and scaled down."""
    alt = f"{name}: first, middle and last frame"
    pictures = "".join(image(frame, alt=alt, quality=QUALITY) for frame in frames)
    return Raw(f'<div class="strip">{pictures}</div>')


def _first(shown: int, total: int) -> str:
    return f"{total:,}" if shown == total else f"first {shown:,} of {total:,} (html_clips)"


def _cells(row: Row, *, exact_tokens: bool) -> list[object]:
    warnings = "".join(f'<div class="warn">{escape(text)}</div>' for text in row.warnings)
    mark = "bad" if row.tokens > MAX_TOKENS else ""
    about = "" if exact_tokens else "about "
    return [
        row.strip,
        Raw("whole") if row.crop is None else _drawing(row.crop),
        Raw(f'<span class="code">{escape(row.name)}</span>{warnings}'),
        Raw("".join(f"<p>{escape(text)}</p>" for text in row.captions)),
        row.activity,
        Keyed(Raw(f'<span class="{mark}">{about}{row.tokens}</span>'), row.tokens),
        row.split,
        row.bucket,
        round(row.start_s, 3),
    ]


def _drawing(crop: Crop) -> Raw:
    """Draw the source's outline and the part that is kept, to scale."""
    width, height = crop.source
    left, top, kept_width, kept_height = crop.box
    text = f"{kept_width}x{kept_height} at {left},{top} of {width}x{height}"
    longest = max(width, height)
    scale = CROP_PX / longest
    return Raw(
        f'<svg width="{width * scale:.0f}" height="{height * scale:.0f}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{text}">'
        f'<rect width="{width}" height="{height}" fill="currentColor" opacity=".18"/>'
        f'<rect x="{left}" y="{top}" width="{kept_width}" height="{kept_height}" fill="none" '
        f'stroke="currentColor" stroke-width="{longest / 32:.0f}"/></svg>'
        f'<div class="soft">{text}</div>'
    )


def _joined(rows: Iterable[tuple[str, str]]) -> dict[str, Raw]:
    """Put rows of the same name under one heading."""
    joined: dict[str, list[str]] = {}
    for name, text in rows:
        joined.setdefault(name, []).append(escape(text))
    return {name: Raw("<br>".join(texts)) for name, texts in joined.items()}
