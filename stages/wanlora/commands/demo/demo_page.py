"""What a person looks at after the demo: report.html, and base and adapter side by side.

Owns: the look of both. Dimensions: n clips, t frames, h and w pixels.
"""

import base64
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from wanlora.commands.demo.measure import Made, Video
from wanlora.report.gif import gif
from wanlora.report.page import Raw, escape, facts, page, section, table

SCALE = 2
"""Pixels of the picture for one of the clip."""
GAP_PX = 6


def comparison_gif(base: Made, adapter: Made, *, fps: float, count: int = 6) -> bytes:
    """The first clips of both, base above and adapter below, as a GIF that repeats."""
    rows = [_row(made.clips[:count]) for made in (base, adapter)]
    gap = np.full((rows[0].shape[0], GAP_PX, *rows[0].shape[2:]), 255, np.uint8)
    frames = np.concatenate([rows[0], gap, rows[1]], axis=1)
    frames = frames.repeat(SCALE, 1).repeat(SCALE, 2)
    # At half the speed: an arm that swings once is easier to see.
    return gif(frames, fps=fps / 2, colours=64)


def demo_page(
    concept: str, gif: bytes, asked: Sequence[str], base: Made, adapter: Made,
    figures: Mapping[str, object], files: Mapping[str, str],
) -> str:  # fmt: skip
    """Build report.html."""
    picture = base64.b64encode(gif).decode()
    rows = [
        [caption, *(f"{one.concept or 'nothing'} ({one.match:.2f})" for one in pair)]
        for caption, pair in zip(asked, zip(base.seen, adapter.seen, strict=True), strict=True)
    ]
    links = {
        name: Raw(f'<a href="{escape(path)}">{escape(path)}</a>') for name, path in files.items()
    }
    return page(
        f"What {concept} is, before and after",
        [
            section(
                "Same prompt, same noise",
                "Above the base model, which has never seen it; below the base with the adapter.",
                Raw(f'<img src="data:image/gif;base64,{picture}" alt="base and adapter">'),
            ),
            section("In numbers", facts(figures)),
            section(
                "What the recogniser says",
                "It names the drawn clip that is nearest in motion; 1 is the same motion, and "
                "under 0.4 is nothing.",
                table(["prompt", "base", "with the adapter"], rows),
            ),
            section("Files", facts(links)),
        ],
    )


def _row(clips: Sequence[Video]) -> UInt8[np.ndarray, "t h w 3"]:
    gap = np.full((*clips[0].shape[:2], GAP_PX, 3), 255, np.uint8)
    parts = [part for clip in clips for part in (clip, gap)]
    return np.concatenate(parts[:-1], axis=2)
