"""One builder for every HTML page: text escaped, tables sortable, pictures inside the file.

Owns: the look of a page and the escaping. Takes text, numbers and arrays. Must not know: clips,
caches, runs. A page loads nothing (its policy forbids it), so it can be mailed or archived.
Dimensions: h height, w width in px.
"""

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from wanlora.report.asset import asset, style

POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'"
)

JPEG_QUALITY = 80
LONG = 24
"""Minimum number of characters of a value that gets its own row."""


class Raw(str):
    """Markup, which is not escaped; all other text is."""

    __slots__ = ()


class Keyed(NamedTuple):
    """A cell that is sorted by a key, not by its text."""

    shown: object
    key: float


def escape(value: object) -> Raw:
    """Convert text to markup; markup stays unchanged, None becomes empty."""
    if isinstance(value, Raw):
        return value
    return Raw("" if value is None else html.escape(str(value)))


def page(title: str, sections: Sequence[str], *, script: str = "", policy: str = POLICY) -> str:
    """Build a whole page.

    Args:
        title: Title of the tab and of the page.
        sections: From `section`, `table`, `facts` and so on; plain text becomes a paragraph.
        script: JavaScript of this page, run after that of the sortable tables.
        policy: Content Security Policy; a page from a server may load more from that server.
    """
    body = "\n".join(
        part if isinstance(part, Raw) else f"<p>{escape(part)}</p>" for part in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n{style('page.css')}</head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{body}\n</main>\n"
        f"<script>{asset('sort.js')}{script}</script></body></html>\n"
    )


def script_source(script: str = "") -> str:
    """Return the source expression of a page's script, for a Content Security Policy."""
    digest = hashlib.sha256((asset("sort.js") + script).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def section(heading: str, *parts: str) -> Raw:
    """A heading and the parts below it; plain text becomes a paragraph."""
    body = "\n".join(p if isinstance(p, Raw) else f"<p>{escape(p)}</p>" for p in parts)
    return Raw(f"<section><h2>{escape(heading)}</h2>\n{body}</section>")


def facts(values: Mapping[str, object]) -> Raw:
    """A list of names and values, one per line."""
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items())
    return Raw(f"<dl>{items}</dl>")


def tiles(values: Mapping[str, object]) -> Raw:
    """Names above values, side by side if there is room; a long value has a row of its own."""
    items = "".join(
        f"<div{' class=long' * (len(str(v)) > LONG)}><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>"
        for k, v in values.items()
    )
    return Raw(f'<dl class="tiles">{items}</dl>')


def table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, sortable: bool = True
) -> Raw:
    """Build a table; a click on a heading sorts by it, numbers as numbers.

    Args:
        headers: Names of the columns.
        rows: Cells; text is escaped unless it is `Raw`; numbers are aligned to the right.
        sortable: A click on a heading sorts.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    columns = zip_longest(headers, zip(*cells, strict=True), fillvalue=("",))
    head = "".join(f"{_head(first)}{escape(name)}</th>" for name, (first, *_) in columns)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    kind = ' class="sortable"' if sortable else ""
    return Raw(
        f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def image(pixels: UInt8[np.ndarray, "h w 3"], *, alt: str = "", quality: int = JPEG_QUALITY) -> Raw:
    """Encode a picture as a JPEG inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = pixels.shape[:2]
    return Raw(
        f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" '
        f'loading="lazy" alt="{escape(alt)}">'
    )


def _head(first_cell: str) -> str:
    """Open a heading; over numbers it is aligned to the right."""
    return '<th class="number">' if 'class="number"' in first_cell else "<th>"


def _cell(value: object) -> str:
    if isinstance(value, Keyed):
        return f'<td class="number" data-sort="{value.key}">{escape(value.shown)}</td>'
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{escape(value)}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return f'<td class="number" data-sort="{value}">{shown}</td>'
