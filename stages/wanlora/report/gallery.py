"""Samples of prompts over the steps of a run: one row per prompt, one column per step.

Owns: which steps are shown and the markup of the rows. Must not know: files, or how a picture is
made.
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wanlora.core.spacing import evenly_spaced
from wanlora.report.asset import style
from wanlora.report.page import Raw, escape

MAX_COLUMNS = 8
MAX_PICTURES = 64
"""Pictures on a page, if that leaves three columns; a picture of 81 frames at 480p has 0.1 MB."""


@dataclass(frozen=True, slots=True)
class Preview:
    """Approximate animated picture of a video generated while training.

    Attributes:
        step: Steps done; 0 is the base model.
        prompt: Text of the prompt.
        picture: The file.
        kind: `gif` or `webp`.
        size: Width and height in px.
    """

    step: int
    prompt: str
    picture: bytes
    kind: str
    size: tuple[int, int]


def shown_steps(steps: Iterable[int], num_prompts: int) -> list[int]:
    """Choose steps evenly, the first and the newest among them, for a page of limited size."""
    known = sorted(set(steps))
    most = min(MAX_COLUMNS, max(3, MAX_PICTURES // max(num_prompts, 1)))
    return [known[place] for place in evenly_spaced(len(known), most)]


def gallery(previews: Sequence[Preview], *, first_is_base: bool) -> Raw:
    """Draw the rows, each under its prompt; the strips scroll sideways if there is no room.

    Args:
        previews: All of them, of the steps shown.
        first_is_base: Step 0 is the base model, not another adapter.
    """
    rows = []
    for prompt in dict.fromkeys(preview.prompt for preview in previews):
        own = sorted((p for p in previews if p.prompt == prompt), key=lambda p: p.step)
        cells = "".join(_cell(preview, first_is_base=first_is_base) for preview in own)
        rows.append(
            f'<h3>{escape(prompt) or "(empty prompt)"}</h3><div class="strip">{cells}</div>'
        )
    return Raw(f'{style("gallery.css")}<div class="gallery">{"".join(rows)}</div>')


def _cell(preview: Preview, *, first_is_base: bool) -> str:
    data = base64.b64encode(preview.picture).decode()
    width, height = preview.size
    label = f"step {preview.step:,}"
    if preview.step == 0:
        label += ", the base model" if first_is_base else ", before training"
    return (
        f'<figure><img src="data:image/{preview.kind};base64,{data}" width="{width}" '
        f'height="{height}" alt="{escape(preview.prompt)}, {label}">'
        f"<figcaption>{label}</figcaption></figure>"
    )
