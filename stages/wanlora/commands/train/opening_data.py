"""Open the data of a run as its settings describe it.

Owns: the use of the settings for data. Must not know: the transformer's weights.
"""

from dataclasses import replace

from wanlora.adapters import targets
from wanlora.commands.train.data import Data
from wanlora.commands.train.preflight import check_cached_for
from wanlora.commands.train.selection import Selection
from wanlora.config import TrainConfig
from wanlora.core.buckets import Bucket, usual
from wanlora.runs import checkpoints, run_folder
from wanlora.store.reader import StoreReader
from wanlora.store.views import ViewClip
from wanlora.training.batch_sizes import BatchSize, batch_sizes
from wanlora.training.batches import BatchSource
from wanlora.training.source import make_source
from wanlora.training.validation import Panel, make_panel
from wanlora.wan.variants import Variant


def open_data(config: TrainConfig, variant: Variant, selection: Selection) -> Data:
    """Open the store, and check that it has all clips, encoded for this transformer.

    Raises:
        StoreError: Clips are missing, or encodings do not fit.
    """
    view, clips = selection
    check_cached_for(config, variant, selection)
    held_out = tuple(clip for clip in view.clips if clip.split == config.validation.split)
    needed = replace(view, clips=(*clips, *held_out))
    sizes = _batch_sizes(config, variant, clips)
    usual_shift = _usual_shift(config, variant, clips)
    source = make_source(
        view,
        StoreReader.of_view(config.cache, needed, variant.kinds, local_copy=config.local_copy),
        clips,
        variant,
        seed=config.seed,
        sampler=config.flow.sampler,
        shift=config.flow.shift or usual_shift,
        sigmas=variant.part(config.expert).sigmas,
        batch_size={bucket: size.global_batch for bucket, size in sizes.items()},
        weighting=config.flow.weighting,
        caption_dropout=config.caption_dropout,
        condition_dropout=config.condition_dropout,
        balance_activities=config.balance_activities,
    )
    panels = _panels(config, source, clips, held_out)
    return Data(
        config.cache, view, clips=clips, held_out=held_out, sizes=sizes, source=source,
        panels=panels, usual_shift=usual_shift,
    )  # fmt: skip


def _usual_shift(config: TrainConfig, variant: Variant, clips: tuple[ViewClip, ...]) -> float:
    """Shift of sigma without `flow.shift`: that of the run so far, or the variant's.

    Release 0.1.0 did not record it, and used the shift of 480p for every size.
    """
    checkpoint = run_folder.newest_checkpoint(config.output_dir) if config.resume else None
    if checkpoint:
        return checkpoints.recorded_shift(checkpoint) or variant.defaults.shift
    return variant.shift_of(usual(clip.bucket for clip in clips))


def _batch_sizes(
    config: TrainConfig, variant: Variant, clips: tuple[ViewClip, ...]
) -> dict[Bucket, BatchSize]:
    linear_names = targets.linear_names(
        variant.shape.num_layers, reads_image=variant.shape.image_dim is not None
    )
    return batch_sizes(
        sorted({clip.bucket for clip in clips}),
        variant.shape,
        by=config.batch_by,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        rank=config.lora.rank,
        adapted=targets.match_targets(linear_names, config.lora.targets),
    )


def _panels(
    config: TrainConfig,
    source: BatchSource,
    clips: tuple[ViewClip, ...],
    held_out: tuple[ViewClip, ...],
) -> tuple[Panel, ...]:
    settings = config.validation
    if not settings.every:
        return ()
    splits = [("val", held_out)] + ([("train", clips)] if settings.train_clips else [])
    panels = [
        make_panel(
            name, members, source, num_clips=settings.num_clips, num_sigmas=settings.num_sigmas
        )
        for name, members in splits
    ]
    return tuple(panel for panel in panels if panel)
