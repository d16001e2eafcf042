"""Forward passes of validation and previews: the time of a run that is not spent in steps.

Owns: the clips that are measured, how often, and by how many processes, as `train` does it.
Must not know: the seconds of a pass; the caller has them.
"""

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from wanlora.config import EstimateConfig
from wanlora.core.buckets import Bucket, usual
from wanlora.store.views import View
from wanlora.training.panel import choose, num_due
from wanlora.wan.variants import Variant

SEED = 0
"""Seed with which `train` chooses validation clips by default."""


class Passes(NamedTuple):
    """Forward passes of one clip each, in groups that all processes start together.

    Attributes:
        times: Number of pauses of the run.
        once_more: Whether everything is measured once more, for the base's losses.
        groups: Clips of a group by size, such as those of a validation panel.
        per_clip: Passes of each clip.
        num_ranks: Processes that share the clips of a group.
    """

    times: int
    once_more: bool
    groups: tuple[tuple[Bucket, ...], ...]
    per_clip: int
    num_ranks: int = 1

    @property
    def rounds(self) -> int:
        """How often every group is measured in the run."""
        return self.times + (self.once_more and self.times > 0)

    @property
    def total(self) -> int:
        """Number of forward passes in the run, over all processes."""
        return self.rounds * self.per_clip * sum(map(len, self.groups))

    def seconds(self, of: Callable[[Bucket], float]) -> float:
        """Seconds of the run by those of a pass: in each group, of the busiest process."""
        longest = (
            max(sum(map(of, group[rank :: self.num_ranks])) for rank in range(self.num_ranks))
            for group in self.groups
        )
        return self.rounds * self.per_clip * sum(longest)


def validation_passes(
    config: EstimateConfig, view: View | None, buckets: Collection[Bucket], *, end_step: int
) -> Passes:
    """Count the passes of validation: each clip at each sigma, and the base's losses once.

    Args:
        config: Its `validation` has the defaults of `train`.
        view: Clips to choose panels from; without it, panels are full, with all sizes equally.
        buckets: Sizes of the training clips.
        end_step: Steps of the run.
    """
    settings = config.validation
    splits = [settings.split] + (["train"] if settings.train_clips else [])
    return Passes(
        times=num_due(end_step, every=settings.every),
        once_more=True,
        groups=tuple(_panel(view, split, buckets, settings.num_clips) for split in splits),
        per_clip=settings.num_sigmas,
        num_ranks=config.num_processes,
    )


def preview_passes(
    config: EstimateConfig, buckets: Iterable[Bucket], variant: Variant, *, end_step: int
) -> Passes:
    """Count the passes of previews, which one process makes while the others wait.

    Args:
        config: Its `previews` has the defaults of `train`: none without prompts.
        buckets: Size of each training clip.
        variant: Its guidance decides whether a denoising step takes two passes.
        end_step: Steps of the run.
    """
    settings, every = config.previews, config.previews.period(end_step)
    guided = 2 if variant.guidance_scale > 1 else 1
    return Passes(
        times=1 + num_due(end_step, every=every) if every else 0,
        once_more=False,
        groups=((usual(buckets),) * (len(settings.prompts) or settings.num_prompts),),
        per_clip=guided * settings.steps,
    )


def _panel(
    view: View | None, split: str, buckets: Collection[Bucket], num_clips: int
) -> tuple[Bucket, ...]:
    """Sizes of the clips of a panel, as `train` chooses them with its default seed."""
    if view is None:
        sizes = sorted(set(buckets))
        return tuple(sizes[index % len(sizes)] for index in range(num_clips))
    clips = [clip for clip in view.clips if clip.split == split]
    activities = [clip.activity for clip in clips]
    groups = [clip.source_group for clip in clips]
    return tuple(clips[index].bucket for index in choose(activities, groups, num_clips, seed=SEED))
