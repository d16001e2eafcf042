"""Videos beside each other that play as one: one button, one slider, the same frame everywhere.

Owns: the markup and the script of synchronised players. The first video of a row leads, the others
follow it.
"""

import base64
from collections.abc import Mapping

from wanlora.report.page import Raw, escape


def player(title: str, note: str, videos: Mapping[str, bytes]) -> Raw:
    """A row of videos under one slider.

    Args:
        title: Above them: the prompt.
        note: Beside it, softly.
        videos: Name to a small mp4.
    """
    cells = "".join(
        f'<figure><video muted loop playsinline preload="auto" '
        f'src="data:video/mp4;base64,{base64.b64encode(data).decode()}"></video>'
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for name, data in videos.items()
    )
    kind = "player many" if len(videos) > 3 else "player"
    return Raw(
        f'<div class="{kind}"><p><q>{escape(title)}</q> <span class="soft">{escape(note)}</span>'
        f'</p><div class="together">{cells}</div><div class="controls">'
        '<button type="button" aria-label="play or pause">▶</button>'
        '<input type="range" min="0" max="1" step="any" value="0" aria-label="time">'
        "</div></div>"
    )


def players(*rows: Raw) -> Raw:
    """Rows of players; as many beside each other as there is room for."""
    return Raw(f'<div class="players">{"".join(rows)}</div>')


STYLE = Raw(
    """<style>
.players { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); }
.player { border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; background: var(--band); }
.player p { margin: 0 0 8px; } .player.many { grid-column: 1 / -1; } .together { display: grid; gap: 8px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 160px), 1fr)); }
.together figure { margin: 0; max-width: 480px; }
.together video { width: 100%; display: block; cursor: pointer; background: #000; }
.together figcaption { color: var(--soft); font-size: 12.5px; margin-top: 2px; }
.controls { display: flex; gap: 10px; align-items: center; margin-top: 8px; }
.controls input { flex: 1; accent-color: light-dark(#2563eb, #7aa2ff); }
button { height: 26px; border: 1px solid var(--line); border-radius: 6px; font: inherit; line-height: 1;
  background: var(--ground); color: var(--ink); cursor: pointer; } .controls button { width: 34px; }
.intervals { max-width: 860px; }
</style>"""  # noqa: E501
)

SCRIPT = """
for (const player of document.querySelectorAll(".player")) {
  const videos = [...player.querySelectorAll("video")], lead = videos[0];
  const button = player.querySelector("button"), slider = player.querySelector("input");
  const seek = time => videos.forEach(video => { video.currentTime = time; });
  const play = () => { seek(lead.currentTime); videos.forEach(video => video.play().catch(() => {})); };
  const pause = () => { videos.forEach(video => video.pause()); seek(lead.currentTime); };
  const toggle = () => lead.paused ? play() : pause();
  button.addEventListener("click", toggle);
  videos.forEach(video => video.addEventListener("click", toggle));
  lead.addEventListener("play", () => { button.textContent = "\\u23F8"; follow(); });
  lead.addEventListener("pause", () => { button.textContent = "\\u25B6"; });
  slider.addEventListener("input", () => { pause(); seek(slider.value * lead.duration); });
  const follow = () => {
    slider.value = lead.duration ? lead.currentTime / lead.duration : 0;
    for (const video of videos.slice(1)) {
      if (Math.abs(video.currentTime - lead.currentTime) > 0.06) video.currentTime = lead.currentTime;
    }
    if (!lead.paused) requestAnimationFrame(follow);
  };
  new IntersectionObserver(([entry]) => { if (!entry.isIntersecting) pause(); }).observe(player);
}
const rows = [...document.querySelectorAll(".player")];
document.querySelector("#play-all")?.addEventListener("click", () => {
  const shown = rows.filter(row => { const box = row.getBoundingClientRect();
    return box.top < innerHeight && box.bottom > 0; });
  const any = shown.some(row => !row.querySelector("video").paused);
  shown.forEach(row => { if (row.querySelector("video").paused !== any) row.querySelector("button").click(); });
});
"""  # noqa: E501
