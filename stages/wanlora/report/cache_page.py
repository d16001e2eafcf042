"""The page of a cache: channels of the latents, and a row per clip of each view.

Owns: the columns and their markup. Must not know: stores, views, or how a picture is found.
Dimensions: h height, w width in px.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from wanlora.report.page import Raw, escape, facts, image, page, section, table

STRIP_PX = 330
"""Width of a strip on the page; the picture itself may be wider."""
CAPTIONS_PX = 220
HEADERS = ("clip", "strip", "captions", "activity", "split", "size", "mean", "std", "min", "max",
           "outlier")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Channels:
    """Statistics of the latents of one shape; of normalised latents 0 and 1 are expected.

    Attributes:
        shape: Shape of a clip's latents.
        num_clips: Clips of this shape.
        num_outliers: Outliers among them.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    shape: tuple[int, ...]
    num_clips: int
    num_outliers: int
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True, slots=True)
class Row:
    """A clip.

    Attributes:
        name: Id of the clip.
        key: Its key in the store, and that key shortened.
        strip: From `strip_picture` or `unreadable`; empty without a picture.
        captions: Key and text of each caption; None for a text that is not recorded.
        activity: As in the view.
        split: As in the view.
        bucket: Frames, height and width, as text.
        statistics: Mean, standard deviation, minimum and maximum of its latents, if known.
        outlier: Values that make it an outlier; empty if it is not one.
    """

    name: str
    key: tuple[str, str]
    strip: Raw
    captions: Sequence[tuple[str, str | None]]
    activity: str
    split: str
    bucket: str
    statistics: tuple[float, float, float, float] | None
    outlier: str


@dataclass(frozen=True, slots=True)
class ViewRows:
    """The clips of a view that are on the page, of `num_clips`, and its kinds of rows."""

    name: str
    kinds: Sequence[str]
    num_clips: int
    rows: Sequence[Row]
    has_pictures: bool


def cache_page(name: str, channels: Sequence[Channels], views: Sequence[ViewRows]) -> str:
    """Build the page of the cache with a name."""
    return page(f"Cache {name}", [_channels(channels), *map(_view, views)])


def strip_picture(pixels: UInt8[np.ndarray, "h w 3"], name: str) -> Raw:
    """Encode the pictures of a clip, joined side by side."""
    return Raw(f'<div style="width:{STRIP_PX}px">{image(pixels, alt=f"frames of {name}")}</div>')


def unreadable(reason: str) -> Raw:
    """Mark a clip whose latents cannot be read."""
    return Raw(f'<span class="bad">{escape(reason)}</span>')


def _channels(channels: Sequence[Channels]) -> Raw:
    parts: list[str] = []
    for each in channels:
        rows = [
            ["mean (of 0)", *(round(value, 2) for value in each.mean)],
            ["std (of 1)", *(round(value, 2) for value in each.std)],
        ]
        parts += [
            facts({"latents": "x".join(map(str, each.shape)), "clips": each.num_clips,
                   "outliers": each.num_outliers}),
            table(["channel", *map(str, range(len(each.mean)))], rows, sortable=False),
        ]  # fmt: skip
    return section("Channels", *parts)


def _view(view: ViewRows) -> Raw:
    note = (
        "Pictures are a linear projection of the latents: no VAE, small, approximate."
        if view.has_pictures
        else "No segment carries the projection to RGB, so there are no pictures."
    )
    return section(
        f"View {view.name}: {len(view.rows)} of {view.num_clips} clips",
        f"Kinds of rows: {', '.join(view.kinds)}. {note}",
        table(HEADERS, map(_cells, view.rows)),
    )


def _cells(row: Row) -> list[object]:
    key, short = row.key
    name = Raw(
        f'{escape(row.name)}<br><span class="code soft" title="{escape(key)}">{short}</span>'
    )
    captions = "".join(
        f'<div title="{escape(key)}">'
        f"{escape('(its text is not recorded)' if text is None else text)}</div>"
        for key, text in row.captions
    )
    return [
        name, row.strip, Raw(f'<div style="min-width:{CAPTIONS_PX}px">{captions}</div>'),
        row.activity, row.split, row.bucket, *(row.statistics or ("",) * 4), row.outlier,
    ]  # fmt: skip
