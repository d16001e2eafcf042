"""Synchronised players: videos side by side with one button and one slider.

Owns: their markup and script. The first video of a row leads, the others follow it.
"""

import base64
from collections.abc import Mapping

from wanlora.report.asset import asset, style
from wanlora.report.page import Raw, escape

STYLE = Raw(style("players.css"))
SCRIPT = asset("players.js")


def player(
    title: str, note: str, videos: Mapping[str, bytes], *, pictures: Mapping[str, Raw] | None = None
) -> Raw:
    """A row of videos under one slider.

    Args:
        title: The prompt, shown above the videos.
        note: Shown beside it in a softer colour.
        videos: Name to a small mp4.
        pictures: Name to a picture, left of the videos.
    """
    stills = "".join(
        f"<figure>{picture}<figcaption>{escape(name)}</figcaption></figure>"
        for name, picture in (pictures or {}).items()
    )
    cells = stills + "".join(
        f'<figure><video muted loop playsinline preload="auto" '
        f'src="data:video/mp4;base64,{base64.b64encode(data).decode()}"></video>'
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for name, data in videos.items()
    )
    kind = "player many" if len(videos) + len(pictures or {}) > 3 else "player"
    return Raw(
        f'<div class="{kind}"><p><q>{escape(title)}</q> <span class="soft">{escape(note)}</span>'
        f'</p><div class="together">{cells}</div><div class="controls">'
        '<button type="button" aria-label="play or pause">▶</button>'
        '<input type="range" min="0" max="1" step="any" value="0" aria-label="time">'
        "</div></div>"
    )


def players(*rows: Raw) -> Raw:
    """Rows of players, side by side if there is room."""
    return Raw(f'<div class="players">{"".join(rows)}</div>')
