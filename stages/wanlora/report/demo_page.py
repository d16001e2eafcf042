"""The page of a demo: base and adapter side by side, the figures, and what was recognised.

Owns: which parts the page has, and the layout of the picture. Must not know: how clips are made,
recognised or measured. Dimensions: t frames, h and w pixels.
"""

import base64
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from wanlora.report.gif import gif
from wanlora.report.page import Raw, escape, facts, page, section, table

SCALE = 2
"""Pixels of the picture per pixel of a clip."""
GAP_PX = 6

Video = UInt8[np.ndarray, "t h w 3"]


def comparison_gif(base: Sequence[Video], adapter: Sequence[Video], *, fps: float) -> bytes:
    """Animate the clips of both models, base above and adapter below."""
    above, below = _row(base), _row(adapter)
    gap = np.full((above.shape[0], GAP_PX, *above.shape[2:]), 255, np.uint8)
    frames = np.concatenate([above, gap, below], axis=1).repeat(SCALE, 1).repeat(SCALE, 2)
    # At half the speed: an arm that swings once is easier to see.
    return gif(frames, fps=fps / 2, colours=64)


def demo_page(
    concept: str, picture: bytes, recognised: Sequence[Sequence[str]],
    figures: Mapping[str, object], files: Mapping[str, str],
) -> str:  # fmt: skip
    """Build the page.

    Args:
        concept: The concept that the adapter was trained on.
        picture: From `comparison_gif`.
        recognised: Prompt, and what was recognised in the base's and in the adapter's clip.
        figures: Figures by name.
        files: Paths relative to the page, by name.
    """
    data = base64.b64encode(picture).decode()
    links = {
        name: Raw(f'<a href="{escape(path)}">{escape(path)}</a>') for name, path in files.items()
    }
    return page(
        f"{concept}: before and after training",
        [
            section(
                "Same prompt, same noise",
                "Top row: the base model, not trained on it. Bottom row: base and adapter.",
                Raw(f'<img src="data:image/gif;base64,{data}" alt="base and adapter">'),
            ),
            section("In numbers", facts(figures)),
            section(
                "Recognised concepts",
                "The concept of the drawn clip that is nearest in motion, and the match: 1 is the "
                "same motion; below 0.4 nothing is recognised.",
                table(["prompt", "base", "with the adapter"], recognised),
            ),
            section("Files", facts(links)),
        ],
    )


def _row(clips: Sequence[Video]) -> Video:
    """Put clips beside each other."""
    gap = np.full((*clips[0].shape[:2], GAP_PX, 3), 255, np.uint8)
    parts = [part for clip in clips for part in (clip, gap)]
    return np.concatenate(parts[:-1], axis=2)
