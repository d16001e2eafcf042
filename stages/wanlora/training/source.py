"""Make the source of a step's tensors from a view and an open store.

Owns: how a BatchSource is made. `training.cached_clips` checks the clips before.
"""

from collections.abc import Mapping, Sequence

from wanlora.core.buckets import Bucket, usual
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip
from wanlora.training.batches import BatchSource
from wanlora.training.flow import ALL_SIGMAS, Range
from wanlora.training.order import Order
from wanlora.wan.variants import Variant


def make_source(
    view: View,
    reader: StoreReader,
    clips: Sequence[ViewClip],
    variant: Variant,
    *,
    seed: int,
    sampler: str,
    shift: float | None,
    sigmas: Range = ALL_SIGMAS,
    batch_size: int | Mapping[Bucket, int] = 1,
    weighting: str = "none",
    caption_dropout: float = 0.0,
    condition_dropout: float = 0.0,
    balance_activities: bool = False,
) -> BatchSource:
    """Make the source of some clips of a view.

    Args:
        view: View of the clips.
        reader: Reader of the view's store.
        clips: At least one.
        variant: Variant of the transformer.
        seed: Seed of every draw.
        sampler: A key of `flow.SAMPLERS`.
        shift: Shift of sigma; None = the variant's for the size of most clips.
        sigmas: Range of sigma that the transformer is for.
        batch_size: Clips per global batch; one number for all buckets, or one per bucket.
        weighting: A key of `flow.WEIGHTINGS`.
        caption_dropout: Probability of the empty prompt.
        condition_dropout: Probability that a clip is trained without its condition.
        balance_activities: See `Order`.
    """
    buckets: dict[Bucket, list[ViewClip]] = {}
    for clip in clips:
        buckets.setdefault(clip.bucket, []).append(clip)
    activities = {
        bucket: [clip.activity for clip in members] for bucket, members in buckets.items()
    }
    order = Order(
        {bucket: len(members) for bucket, members in buckets.items()},
        batch_size=batch_size,
        seed=seed,
        activities=activities if balance_activities else None,
        weights={b: [clip.weight for clip in members] for b, members in buckets.items()},
    )
    return BatchSource(
        reader=reader,
        clips=buckets,
        order=order,
        seed=seed,
        sampler=sampler,
        shift=shift or variant.shift_of(usual(clip.bucket for clip in clips)),
        sigmas=sigmas,
        weighting=weighting,
        caption_dropout=caption_dropout,
        empty_prompt=view.empty_prompt,
        sequence_length=variant.shape.num_text_tokens,
        kinds=variant.kinds,
        condition_dropout=condition_dropout,
    )
