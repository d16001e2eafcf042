"""Forward passes of validation and previews: the time of a run that is not spent in steps.

Owns: the clips that are measured, how often, and by how many processes; the same as in `train`.
Must not know: the seconds of a pass, settings.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

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
        once_more: True if everything is measured twice, the second time for the base's losses.
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
        """Number of times that every group is measured in the run."""
        return self.times + (self.once_more and self.times > 0)

    @property
    def total(self) -> int:
        """Number of forward passes in the run, over all processes."""
        return self.rounds * self.per_clip * sum(map(len, self.groups))

    def seconds(self, of_pass: Callable[[Bucket], float]) -> float:
        """Sum the seconds of the run; a group takes as long as its busiest process.

        Args:
            of_pass: Seconds of a forward pass, by bucket.
        """
        longest = (
            max(sum(map(of_pass, group[rank :: self.num_ranks])) for rank in range(self.num_ranks))
            for group in self.groups
        )
        return self.rounds * self.per_clip * sum(longest)


def validation_passes(
    view: View | None,
    buckets: Collection[Bucket],
    *,
    splits: Sequence[str],
    num_clips: int,
    num_sigmas: int,
    every: int,
    end_step: int,
    num_ranks: int = 1,
) -> Passes:
    """Count the passes of validation: each clip at each sigma, and the base's losses once.

    Args:
        view: View to choose the clips from; without it, panels are full, with all sizes equally.
        buckets: Sizes of the training clips.
        splits: Split of each panel.
        num_clips: Maximum number of clips of a panel.
        num_sigmas: Noise levels of each clip.
        every: Steps between validations; 0 = never.
        end_step: Steps of the run.
        num_ranks: Processes that share the clips of a panel.
    """
    return Passes(
        times=num_due(end_step, every=every),
        once_more=True,
        groups=tuple(_panel(view, split, buckets, num_clips) for split in splits),
        per_clip=num_sigmas,
        num_ranks=num_ranks,
    )


def preview_passes(
    buckets: Iterable[Bucket],
    variant: Variant,
    *,
    num_prompts: int,
    denoising_steps: int,
    every: int,
    end_step: int,
) -> Passes:
    """Count the passes of previews. One process makes them while the others wait.

    Args:
        buckets: Size of each training clip.
        variant: Its guidance decides whether a denoising step takes two passes.
        num_prompts: Prompts of a preview.
        denoising_steps: Denoising steps of each prompt.
        every: Steps between previews; 0 = never.
        end_step: Steps of the run.
    """
    return Passes(
        times=1 + num_due(end_step, every=every) if every else 0,
        once_more=False,
        groups=((usual(buckets),) * num_prompts,),
        per_clip=denoising_steps * (2 if variant.transformers[0].guidance_scale > 1 else 1),
    )


def _panel(
    view: View | None, split: str, buckets: Collection[Bucket], num_clips: int
) -> tuple[Bucket, ...]:
    """Sizes of the clips that `train` chooses for a panel with its default seed."""
    if view is None:
        sizes = sorted(set(buckets))
        return tuple(sizes[index % len(sizes)] for index in range(num_clips))
    clips = [clip for clip in view.clips if clip.split == split]
    activities = [clip.activity for clip in clips]
    groups = [clip.source_group for clip in clips]
    return tuple(clips[index].bucket for index in choose(activities, groups, num_clips, seed=SEED))
