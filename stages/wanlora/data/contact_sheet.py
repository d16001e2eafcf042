"""Data of the contact sheet: frames, crops and token counts of the clips.

Owns: the choice of frames, and the crop of each clip. Pixels come from
`clip_frames`; the markup is in `report.contact_sheet_page`.
Dimensions: h height, w width in px.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora.core.aspect import cover_size
from wanlora.core.buckets import MAX_SIDE_PX
from wanlora.data.clip import Clip, sample_aspect
from wanlora.data.clip_frames import load_clip
from wanlora.data.survey import Plan
from wanlora.errors import MediaError
from wanlora.files import write_text
from wanlora.progress import bar
from wanlora.report.contact_sheet_page import Crop, Left, Row, contact_sheet_page, frame_strip
from wanlora.report.generated import marked

NUM_SHOWN = 3
THUMBNAIL_PX = 112
"""Longest side of a frame on the page."""


def write(
    path: Path,
    clips: Sequence[Clip],
    left: Iterable[tuple[str, str, str]],
    plan: Plan,
    token_counts: Mapping[str, int],
    *,
    command: str,
    most: int,
) -> None:
    """Write the page, with a progress bar.

    Args:
        path: Path of the page; its folder is made.
        clips: Clips in the order of the page.
        left: Name, error code and message of each source or clip that is not used.
        plan: Plan whose rows are at the top of the page.
        token_counts: Number of tokens of every caption.
        command: Name of the command: the title, and the mark of the page.
        most: Maximum number of clips, and of unused sources, on the page; the first ones are shown.
    """
    rows, unused = [], [Left(*each) for each in left]
    num_usable = len(clips)
    with bar(total=min(most, len(clips)), description="contact sheet", unit="clip") as progress:
        for clip in clips[:most]:
            try:
                rows.append(_row(clip, token_counts))
            except MediaError as error:
                unused.append(Left(clip.clip_id, error.code, str(error)))
                num_usable -= 1
            progress.update(1)
    html = contact_sheet_page(
        f"wanlora {command}", plan.rows(), rows, num_usable, unused,
        exact_tokens=bool(plan.captions.tokenizer), most=most,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, marked(html, command))


def _row(clip: Clip, token_counts: Mapping[str, int]) -> Row:
    return Row(
        strip=frame_strip(shown_frames(clip), clip.clip_id),
        crop=_crop(clip),
        name=clip.clip_id,
        warnings=clip.warnings,
        captions=clip.prompts,
        activity=clip.activity,
        tokens=max(token_counts[text] for text in clip.prompts),
        split=clip.split,
        bucket=str(clip.bucket),
        start_s=clip.start_s,
    )


def shown_frames(clip: Clip) -> list[UInt8[np.ndarray, "h w 3"]]:
    """First, middle and last frame of a clip, cropped as the VAE will see them, scaled down."""
    last = clip.num_frames - 1
    picked = sorted({round(k * last / (NUM_SHOWN - 1)) for k in range(NUM_SHOWN)})
    if clip.kind == "npz":
        pixels = load_clip(clip)[picked]
    else:
        starts = [clip.start_s + index / clip.fps for index in picked]
        single = (replace(clip, num_frames=1, start_s=start) for start in starts)
        pixels = torch.cat([load_clip(one) for one in single])
    scale = THUMBNAIL_PX / max(clip.height, clip.width)
    size = (round(clip.height * scale), round(clip.width * scale))
    small = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return list(small.permute(0, 2, 3, 1).numpy())


def crop_box(clip: Clip) -> tuple[int, int, int, int] | None:
    """Return the part of its source that a clip keeps, in upright px with square pixels.

    Returns:
        left, top, width, height; None for a clip that is already cut, or whose line has no size.
    """
    width, height = (clip.orig.get(name) for name in ("width", "height"))
    if clip.kind == "npz" or not (_is_size(width) and _is_size(height)):
        return None
    aspect = sample_aspect(clip.transform)
    covered = cover_size(height, width, height=clip.height, width=clip.width, sample_aspect=aspect)
    down, across = height / covered[0], float(width * aspect) / covered[1]
    kept = (round(clip.width * across), round(clip.height * down))
    left, top = (covered[1] - clip.width) // 2 * across, (covered[0] - clip.height) // 2 * down
    return round(left), round(top), *kept


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= MAX_SIDE_PX


def _crop(clip: Clip) -> Crop | None:
    box = crop_box(clip)
    if box is None:
        return None
    width = round(int(clip.orig["width"]) * float(sample_aspect(clip.transform)))
    return Crop((width, int(clip.orig["height"])), box)
