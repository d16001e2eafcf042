"""Data of a run: training and held-out clips of an open store, and the panels to validate on.

Owns: the check of the rows that validations read. `selection` decides which clips are trained on.
"""

import shlex
from dataclasses import dataclass

import torch
from torch import Tensor

from wanlora.core.buckets import Bucket
from wanlora.core.location import Location
from wanlora.errors import NonFiniteError
from wanlora.store.views import View, ViewClip
from wanlora.training.batch_sizes import BatchSize
from wanlora.training.batches import BatchSource
from wanlora.training.validation import Panel


@dataclass(frozen=True)
class Data:
    """Clips to train on, panels to validate on, and the source of their tensors.

    Attributes:
        cache: Place of the store and the view.
        clips: Clips to train on.
        held_out: Clips of the validation split.
        sizes: Clips per step, by bucket.
        panels: Clips and noise levels to validate on; empty without validation.
        usual_shift: Shift of sigma without `flow.shift`; a run that continues keeps its own.
    """

    cache: Location
    view: View
    clips: tuple[ViewClip, ...]
    held_out: tuple[ViewClip, ...]
    sizes: dict[Bucket, BatchSize]
    source: BatchSource
    panels: tuple[Panel, ...]
    usual_shift: float

    def bucket(self, step: int) -> Bucket:
        """Bucket of a step's clips, the same on every rank."""
        return self.source.order.batch(step).bucket

    def num_clips(self, step: int) -> int:
        """Clips in a step's global batch, over all ranks."""
        return self.sizes[self.bucket(step)].global_batch


def read_fixed_rows(data: Data) -> None:
    """Read every row that validations use, before the first step depends on them.

    Raises:
        StoreError: A row is missing or damaged.
        NonFiniteError: A row contains NaN or infinity.
    """
    for panel in data.panels:
        for clip in panel.clips:
            name = f"{panel.name} clip {clip.clip_id}"
            require_finite(data.cache, f"the latents of {name}", data.source.latents(clip))
            prompt = data.source.padded_prompt(clip.prompts[0])
            require_finite(data.cache, f"the caption of {name}", prompt)
            for field, rows in data.source.conditions([clip]).items():
                require_finite(data.cache, f"the {field.replace('_', ' ')} of {name}", rows)


def require_finite(cache: Location, name: str, row: Tensor) -> None:
    """Refuse a row that contains NaN or infinity.

    Args:
        cache: The row's cache; named in the message.
        name: Name of the row.
        row: Its values.

    Raises:
        NonFiniteError: Names the row.
    """
    if not torch.isfinite(row).all():
        raise NonFiniteError(
            f"{name}: the cached values are NaN or infinite. Run: wanlora inspect "
            f"{shlex.quote(str(cache))} --verify"
        )
