"""`--html`: every clip of a cache on one page, from the cache alone.

Owns: what a clip looks like there. Pictures come from the linear projection whose normal equations
the segments carry, so neither the VAE nor the sources are needed; they are small and approximate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, UInt8

from wanlora.commands.inspect.statistics import BucketStatistics, ClipStatistics, evenly
from wanlora.core.location import Location
from wanlora.errors import StoreError
from wanlora.files import write_text
from wanlora.report.generated import marked
from wanlora.report.page import Raw, escape, facts, image, page, section, table
from wanlora.store import schema
from wanlora.store.latent_rgb import solve, to_rgb
from wanlora.store.row_reader import RowReader
from wanlora.store.schema import Kind
from wanlora.store.views import View, ViewClip

FRAMES = 6
"""Pictures in a strip, evenly spaced over the latent frames."""

HEIGHT_PX = 72
"""Least height of a picture: small latents are enlarged by a whole factor."""

STRIP_PX = 330
"""Width of a strip on the page; the picture itself may be wider."""

CAPTIONS_PX = 220

HEADERS = ("clip", "strip", "captions", "activity", "split", "size", "mean", "std", "min", "max",
           "stands out")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the page's rows come from."""

    latents: RowReader
    text: RowReader | None
    projection: Float64[np.ndarray, "k 3"] | None
    clips: Mapping[str, ClipStatistics]
    outliers: Mapping[str, str]


def write(
    path: Path,
    *,
    cache: Location,
    views: Sequence[View],
    readers: Mapping[tuple[Kind, str], RowReader],
    statistics: Mapping[tuple[int, ...], BucketStatistics],
    most: int,
) -> None:
    """Write the page whole.

    Args:
        path: Where; its folder is made.
        cache: Named at the top.
        views: A section each.
        readers: Of every kind and fingerprint.
        statistics: Over all clips.
        most: Clips on the page, evenly spaced over each view.
    """
    clips = {clip.key: clip for sums in statistics.values() for clip in sums.clips}
    outliers = {key: text for sums in statistics.values() for key, text in sums.outliers().items()}
    sections: list[str] = [_channels(statistics)]
    for view in views:
        latents = readers.get(("latents", view.latents))
        if latents is None:
            continue
        text = readers.get(("text", view.text))
        source = _Source(latents, text, _projection(latents), clips, outliers)
        chosen = set(evenly((clip.clip_id for clip in view.clips), most))
        rows = [_row(clip, source) for clip in view.clips if clip.clip_id in chosen]
        shown = f"{len(rows)} of {len(view.clips)} clips"
        note = (
            "Pictures are a linear projection of the latents: no VAE, small, approximate."
            if source.projection is not None
            else "No segment carries the projection to RGB, so there are no pictures."
        )
        sections.append(section(f"View {view.name}: {shown}", note, table(HEADERS, rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, marked(page(f"Cache {cache}", sections), "inspect"))


def _channels(statistics: Mapping[tuple[int, ...], BucketStatistics]) -> Raw:
    """Mean and spread of every channel: normalised latents have 0 and 1."""
    parts: list[str] = []
    for shape, sums in sorted(statistics.items()):
        mean, std = sums.channels()
        if not mean:
            continue
        rows = [
            ["mean (of 0)", *(round(value, 2) for value in mean)],
            ["std (of 1)", *(round(value, 2) for value in std)],
        ]
        odd = len(sums.outliers())
        parts += [
            facts({"latents": "x".join(map(str, shape)), "clips": len(sums.clips),
                   "clips that stand out": odd}),
            table(["channel", *map(str, range(len(mean)))], rows, sortable=False),
        ]  # fmt: skip
    return section("Channels", *parts)


def _row(clip: ViewClip, source: _Source) -> list[object]:
    numbers = source.clips.get(clip.key)
    values = (numbers.mean, numbers.std, numbers.least, numbers.greatest) if numbers else ("",) * 4
    name = Raw(
        f'{escape(clip.clip_id)}<br><span class="code soft" title="{escape(clip.key)}">'
        f"{schema.short(clip.key)}</span>"
    )
    return [
        name, _strip(clip, source), _captions(clip, source), clip.activity, clip.split,
        str(clip.bucket), *values, source.outliers.get(clip.key, ""),
    ]  # fmt: skip


def _strip(clip: ViewClip, source: _Source) -> Raw:
    try:
        latents = source.latents.read(clip.key)
    except StoreError as error:
        return Raw(f'<span class="bad">{escape(str(error))}</span>')
    if source.projection is None:
        return Raw("")
    picture = image(strip(latents, source.projection), alt=f"frames of {clip.clip_id}")
    return Raw(f'<div style="width:{STRIP_PX}px">{picture}</div>')


def strip(
    latents: Float[np.ndarray, "c f h w"], projection: Float64[np.ndarray, "k 3"]
) -> UInt8[np.ndarray, "hh ww 3"]:
    """Approximate pictures of a clip side by side, first frame on the left."""
    count = min(FRAMES, latents.shape[1])
    places = np.linspace(0, latents.shape[1] - 1, count).round().astype(int)
    pictures = to_rgb(latents[:, places], projection)
    factor = max(1, -(-HEIGHT_PX // pictures.shape[1]))
    pictures = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    joined: np.ndarray[Any, np.dtype[np.uint8]] = np.concatenate(list(pictures), axis=1)
    return joined


def _captions(clip: ViewClip, source: _Source) -> Raw:
    lines = []
    for key in clip.prompts:
        row = None if source.text is None else source.text.rows.get(key)
        text = None if row is None or source.text is None else source.text.source(row)
        shown = escape(text if isinstance(text, str) else "(its text is not recorded)")
        lines.append(f'<div title="{escape(key)}">{shown}</div>')
    return Raw(f'<div style="min-width:{CAPTIONS_PX}px">{"".join(lines)}</div>')


def _projection(reader: RowReader) -> Float64[np.ndarray, "k 3"] | None:
    equations = reader.latent_rgb()
    return None if equations is None else solve(*equations)
