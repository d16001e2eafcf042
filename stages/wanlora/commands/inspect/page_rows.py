"""`--html`: rows of the cache's page, from the cache alone.

Owns: the choice of clips, and their pictures: a linear projection of the latents, fitted from the
normal equations in the segments. It needs neither the VAE nor the sources; the pictures are small
and approximate. The markup is in `report.cache_page`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, UInt8

from wanlora.commands.inspect.statistics import BucketStatistics, ClipStatistics, evenly
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.core.spacing import evenly_spaced
from wanlora.errors import StoreError
from wanlora.files import write_text
from wanlora.report.cache_page import (
    Channels,
    Row,
    ViewRows,
    cache_page,
    strip_picture,
    unreadable,
)
from wanlora.report.generated import marked
from wanlora.report.page import Raw
from wanlora.store import schema
from wanlora.store.latent_rgb import solve, to_rgb
from wanlora.store.row_reader import RowReader
from wanlora.store.views import View, ViewClip

FRAMES = 6
"""Pictures in a strip, evenly spaced over the latent frames."""

HEIGHT_PX = 72
"""Minimum height of a picture: small latents are enlarged by a whole factor."""


@dataclass(frozen=True, slots=True)
class _Source:
    """Readers and statistics for the rows of a view."""

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
    """Write the page.

    Args:
        path: Path of the page; its folder is made.
        cache: Cache folder or URL, shown at the top.
        views: Views of the cache; each has a section.
        readers: Readers by kind and fingerprint.
        statistics: Statistics over all clips, by shape.
        most: Maximum number of clips per view, evenly spaced over the view.
    """
    clips = {clip.key: clip for sums in statistics.values() for clip in sums.clips}
    outliers = {key: text for sums in statistics.values() for key, text in sums.outliers().items()}
    shown = []
    for view in views:
        latents = readers.get(("latents", view.fingerprint("latents")))
        if latents is None:
            continue
        text = readers.get(("text", view.fingerprint("text")))
        source = _Source(latents, text, _projection(latents), clips, outliers)
        chosen = set(evenly((clip.clip_id for clip in view.clips), most))
        rows = [_row(clip, source) for clip in view.clips if clip.clip_id in chosen]
        has_pictures = source.projection is not None
        shown.append(
            ViewRows(view.name, view.kinds, len(view.clips), rows, has_pictures=has_pictures)
        )
    html = cache_page(str(cache), list(_channels(statistics)), shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, marked(html, "inspect"))


def _channels(statistics: Mapping[tuple[int, ...], BucketStatistics]) -> Iterator[Channels]:
    """Statistics of each shape that has clips."""
    for shape, sums in sorted(statistics.items()):
        mean, std = sums.channels()
        if mean:
            yield Channels(shape, len(sums.clips), len(sums.outliers()), mean, std)


def _row(clip: ViewClip, source: _Source) -> Row:
    found = source.clips.get(clip.key)
    return Row(
        name=clip.clip_id,
        key=(clip.key, schema.short(clip.key)),
        strip=_strip(clip, source),
        captions=[(key, _caption(key, source.text)) for key in clip.prompts],
        activity=clip.activity,
        split=clip.split,
        bucket=str(clip.bucket),
        statistics=(found.mean, found.std, found.least, found.greatest) if found else None,
        outlier=source.outliers.get(clip.key, ""),
    )


def _strip(clip: ViewClip, source: _Source) -> Raw:
    try:
        latents = source.latents.read(clip.key)
    except StoreError as error:
        return unreadable(str(error))
    if source.projection is None:
        return Raw("")
    return strip_picture(strip(latents, source.projection), clip.clip_id)


def strip(
    latents: Float[np.ndarray, "c f h w"], projection: Float64[np.ndarray, "k 3"]
) -> UInt8[np.ndarray, "hh ww 3"]:
    """Approximate pictures of a clip side by side, first frame on the left."""
    pictures = to_rgb(latents[:, evenly_spaced(latents.shape[1], FRAMES)], projection)
    factor = max(1, -(-HEIGHT_PX // pictures.shape[1]))
    pictures = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    joined: np.ndarray[Any, np.dtype[np.uint8]] = np.concatenate(list(pictures), axis=1)
    return joined


def _caption(key: str, reader: RowReader | None) -> str | None:
    """Text of a prompt's key; None if it is not recorded."""
    row = None if reader is None else reader.rows.get(key)
    text = None if row is None or reader is None else reader.source(row)
    return text if isinstance(text, str) else None


def _projection(reader: RowReader) -> Float64[np.ndarray, "k 3"] | None:
    equations = reader.latent_rgb()
    return None if equations is None else solve(*equations)
