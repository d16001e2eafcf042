"""The case of an estimate, put together from the settings.

Owns: the clips, the model and the batch sizes that `train` would choose with the same settings.
Without a probe it must not import torch.
"""

from collections import Counter
from collections.abc import Mapping

from wanlora.adapters import targets
from wanlora.commands.estimate.card import Card, find_card
from wanlora.commands.estimate.case import Case
from wanlora.config import EstimateConfig
from wanlora.core.buckets import Bucket
from wanlora.errors import ConfigError
from wanlora.store.views import View, read_view
from wanlora.training.batch_sizes import BatchSize, batch_sizes
from wanlora.training.cached_clips import weighted
from wanlora.training.order import Order
from wanlora.training.workload import is_compiled, workload
from wanlora.wan.model_folder import SECOND, TRANSFORMER, resolve_configs
from wanlora.wan.variants import VARIANTS, Variant, variant_of


def open_case(config: EstimateConfig) -> Case:
    """Select the clips, the model, the card and the batch sizes.

    Raises:
        ConfigError: No GPU of that name is known, the view has no clips to train on, or previews
            are set for a model with two transformers.
        ModelError: The model has no such expert, or the probe needs one.
        StoreError: There is no such cache or view.
        DeviceError: The device to probe does not work.
    """
    view = read_view(config.cache, config.view) if config.cache else None
    variant = _variant(config, view)
    config.previews.check_model(variant, adapter="RUN")
    if view is None:
        given = (Bucket(frames, config.height, config.width) for frames in config.frames)
        buckets = to_encode = Counter(dict.fromkeys(given, config.clips))
    else:
        buckets = Counter(clip.bucket for clip in view.clips if clip.split == "train")
        to_encode = Counter(clip.bucket for clip in view.clips)
    if not buckets:
        raise ConfigError(f"view {config.view!r} of {config.cache} has no clips to train on")
    card = _card(config, model=config.model or (view.model if view else variant.name))
    rank = config.lora.rank
    linear_names = targets.linear_names(
        variant.shape.num_layers, reads_image=variant.shape.image_dim is not None
    )
    adapted = targets.match_targets(linear_names, config.lora.targets)
    sizes = batch_sizes(
        sorted(buckets), variant.shape, by=config.batch_by,
        batch_size=config.batch_size, accumulation=config.gradient_accumulation_steps,
        rank=rank, adapted=adapted,
    )  # fmt: skip
    compiled = is_compiled(config.eager, card.device_type, dora=config.lora.dora)
    works = {
        bucket: workload(
            variant, bucket, batch_size=size.micro_batch, rank=rank, adapted=adapted,
            compiled=compiled, element_bytes=card.element_bytes, quantize=config.quantize,
        )
        for bucket, size in sizes.items()
    }  # fmt: skip
    return Case(
        cache=config.cache, view=view, variant=variant, buckets=buckets, to_encode=to_encode,
        card=card, sizes=sizes, works=works,
        order=_order(view, buckets, sizes, config.clip_weights),
        num_epochs=config.num_epochs, num_processes=config.num_processes, expert=config.expert,
    )  # fmt: skip


def _variant(config: EstimateConfig, view: View | None) -> Variant:
    """Variant of a model's folder; without a model, the variant of that name."""
    if config.model:
        parts = (SECOND,) if config.expert == "low" else TRANSFORMER
        variant = variant_of(resolve_configs(config.model, parts), config.expert)
    else:
        variant = VARIANTS[config.variant or (view.variant if view else "t2v-1.3b")]
    if config.expert or config.probe:
        variant.part(config.expert)  # raises an error for an unknown expert
    return variant


def _card(config: EstimateConfig, *, model: str) -> Card:
    if not config.probe:
        return find_card(config.device, memory_gb=config.memory_gb)
    from wanlora.commands.estimate.probe import card_here  # noqa: PLC0415  (imports torch)

    return card_here(config.device, model)


def _order(
    view: View | None,
    buckets: Counter[Bucket],
    sizes: Mapping[Bucket, BatchSize],
    clip_weights: Mapping[str, float],
) -> Order:
    """Order of the run with the default seed; without a view, all weights are 1."""
    weights: dict[Bucket, list[float]] = {}
    clips = tuple(clip for clip in view.clips if clip.split == "train") if view else ()
    for clip in weighted(clips, clip_weights):
        weights.setdefault(clip.bucket, []).append(clip.weight)
    batch_size = {bucket: size.global_batch for bucket, size in sizes.items()}
    return Order(buckets, batch_size=batch_size, seed=0, weights=weights or None)
