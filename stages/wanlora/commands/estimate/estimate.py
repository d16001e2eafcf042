"""Counts for a set of clips and a card, put together.

Owns: the choice of card, and the figures of the result. Bytes and FLOPs are counted (`cost.memory`,
`cost.flops`), seconds follow from published rates (`cost.gpus`) or from a probe (`probe`). Without
a probe it must not import torch.
"""

import difflib
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from wanlora.adapters import targets
from wanlora.commands.estimate.case import Card, Case
from wanlora.commands.estimate.pauses import Passes, preview_passes, validation_passes
from wanlora.commands.estimate.table import Batch, EstimateResult, Mode, Pause
from wanlora.config import EstimateConfig
from wanlora.core.buckets import Bucket
from wanlora.cost.flops import Recompute
from wanlora.cost.gpus import GPUS, MEMORY_GIB, Gpu, gpu_named, gpu_of, memory_of, other_size
from wanlora.cost.memory import longest_clip, num_trained, plan, step_bytes
from wanlora.cost.seconds import (
    VAE_SHARE_OF_PEAK,
    Seconds,
    all_reduce_bytes,
    encode_seconds,
    floor_seconds,
    model_flops,
)
from wanlora.cost.sizes import TOKENS_PER_CAPTION, cache_bytes, checkpoint_bytes
from wanlora.errors import ConfigError
from wanlora.store import schema, storage
from wanlora.store.views import View, read_view
from wanlora.training.batch_sizes import BatchSize, batch_sizes
from wanlora.training.cached_clips import weighted
from wanlora.training.order import Order, describe_untrained
from wanlora.training.schedule import describe_short_run
from wanlora.training.workload import Modes, budget_of_gpu, describe, is_compiled, workload
from wanlora.wan.model_folder import TRANSFORMER, resolve
from wanlora.wan.variants import VARIANTS, Variant, variant_of

DEFAULT_GPU = "H100"

_GPU_DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Files of the drivers that torch can use as `cuda` on Linux: NVIDIA's, WSL's, AMD's."""

_WAYS: tuple[Recompute, ...] = ("none", "selective", "full")


def run(config: EstimateConfig) -> EstimateResult:
    """Count what a run takes, and predict or measure how long.

    Raises:
        ConfigError: No card of that name is known, and no probe was asked for.
        StoreError: There is no such cache or view.
        DeviceError: The device to probe does not work, or nothing fits into its memory.
    """
    case = _case(config)
    if config.probe:
        from wanlora.commands.estimate.probe import probe  # noqa: PLC0415  (imports torch and diffusers)

        case = replace(case, trial=probe(case, _model(config) or ""))
    return _result(case, case.trial.modes if case.trial else _planned(case))


def _case(config: EstimateConfig) -> Case:
    view = read_view(config.cache, config.view) if config.cache else None
    variant = _variant(config, view)
    every = _buckets(config, view, split=None)
    buckets = _buckets(config, view, split="train")
    if not buckets:
        raise ConfigError(f"view {config.view!r} of {config.cache} has no clips to train on")
    card = _card(config, view.model if view else variant.name)
    rank = config.lora.rank
    adapted = targets.match_targets(targets.linear_names(variant.num_layers), config.lora.targets)
    sizes = batch_sizes(
        sorted(buckets), variant.transformer_shape, by=config.batch_by,
        batch_size=config.batch_size, accumulation=config.gradient_accumulation_steps,
        rank=rank, adapted=adapted,
    )  # fmt: skip
    compiled = is_compiled(config.eager, card.device_type, dora=config.lora.dora)
    works = {
        bucket: workload(
            variant, bucket, batch_size=size.micro_batch, rank=rank, adapted=adapted,
            compiled=compiled, element_bytes=card.element_bytes,
        )
        for bucket, size in sizes.items()
    }  # fmt: skip
    order = _order(config, view, buckets, sizes)
    return Case(config, view, variant, buckets, every, card, sizes, works, order, trial=None)


def _order(
    config: EstimateConfig,
    view: View | None,
    buckets: Counter[Bucket],
    sizes: Mapping[Bucket, BatchSize],
) -> Order:
    """Order of the run with the default seed; without a view, all weights are 1."""
    weights: dict[Bucket, list[float]] = {}
    clips = tuple(clip for clip in view.clips if clip.split == "train") if view else ()
    for clip in weighted(clips, config.clip_weights):
        weights.setdefault(clip.bucket, []).append(clip.weight)
    batch_size = {bucket: size.global_batch for bucket, size in sizes.items()}
    return Order(buckets, batch_size=batch_size, seed=0, weights=weights or None)


def _model(config: EstimateConfig) -> str | None:
    if config.model or not config.cache:
        return config.model
    return read_view(config.cache, config.view).model


def _variant(config: EstimateConfig, view: View | None) -> Variant:
    if config.model:
        return variant_of(resolve(config.model, TRANSFORMER))
    return VARIANTS[config.variant or (view.variant if view else "t2v-1.3b")]


def _buckets(config: EstimateConfig, view: View | None, *, split: str | None) -> Counter[Bucket]:
    if view is None:
        given = (Bucket(frames, config.height, config.width) for frames in config.frames)
        return Counter(dict.fromkeys(given, config.clips))
    return Counter(clip.bucket for clip in view.clips if split in (None, clip.split))


def _card(config: EstimateConfig, model: str) -> Card:
    if config.probe:
        from wanlora.commands.estimate.probe import card_here  # noqa: PLC0415  (imports torch)

        return card_here(config.device, config.model or model)
    name = config.device
    if name == "auto":
        name = _gpu_here() or DEFAULT_GPU
    key = gpu_named(name)
    gpu = gpu_of(name) or GPUS.get(key or "")
    if config.memory_gb:
        memory = config.memory_gb * 1e9
    elif gpu or key:
        memory = gpu.memory_bytes if gpu else memory_of(key or "")
    else:
        raise ConfigError(_unknown(name))
    if not config.memory_gb and config.device != "auto" and (size := other_size(name, memory)):
        raise ConfigError(
            f"--device {name}: {key or name} is known with {memory / 2**30:.0f} GiB. For a card "
            f"with other memory, pass its size: --memory-gb {size}"
        )
    return Card(key or name, gpu, "cuda", budget_of_gpu(memory))


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, [*GPUS, *MEMORY_GIB], n=2, cutoff=0.5)
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    return (
        f"--device {name}: unknown GPU{meant}. With --memory-gb N its memory is counted, without "
        "times; --probe measures on a device of this machine. GPUs whose times are predicted: "
        f"{', '.join(GPUS)}"
    )


def _gpu_here() -> str | None:
    """Name of this machine's GPU; torch is imported only if there is a driver."""
    if sys.platform == "linux" and not any(Path(name).exists() for name in _GPU_DRIVERS):
        return None
    import torch  # noqa: PLC0415  (two seconds)

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _planned(case: Case) -> Modes:
    chosen = case.config.activations
    if chosen == "auto":
        return plan(case.work, case.card.limit_bytes)
    return (chosen,) * case.work.shape.num_layers


def _result(case: Case, modes: Modes) -> EstimateResult:
    config, card, work, gpu = case.config, case.card, case.work, case.card.gpu
    seconds = case.seconds(modes)
    flops, epoch, steps = case.mean(model_flops), case.steps_per_epoch, case.steps
    validation = _pause(case, validation_passes(config, case.view, case.buckets, end_step=steps))
    previews = _pause(
        case, preview_passes(config, case.buckets.elements(), case.variant, end_step=steps)
    )
    batch_sizes = {bucket: size.global_batch for bucket, size in case.sizes.items()}
    trained = num_trained(work.shape, work.adapted, work.rank)
    checkpoints = _num_checkpoints(
        steps, save_steps=config.save_steps, keep_checkpoints=config.keep_checkpoints
    )
    peak = step_bytes(work, modes).total
    return EstimateResult(
        variant=case.variant.name,
        gpu=card.name,
        measured=case.trial is not None,
        buckets={str(bucket): number for bucket, number in sorted(case.buckets.items())},
        lora=f"rank {work.rank} on {_words(config.lora.targets)}",
        trained_parameters=trained,
        batches={str(bucket): _batch(case, bucket, modes) for bucket in case.sizes},
        clips_per_step=float(case.order.draws_per_epoch / epoch),
        num_processes=config.num_processes,
        sent_bytes_per_step=all_reduce_bytes(trained, config.num_processes),
        tflop_per_step=config.num_processes * flops / 1e12,
        floor_s=case.mean(lambda item: floor_seconds(item, gpu)) if gpu else None,
        seconds_per_step=seconds.total if seconds else None,
        parts=asdict(seconds) if seconds and gpu else {},
        mfu=flops / seconds.total / gpu.peak_flops if seconds and gpu else None,
        activations=describe(modes),
        peak_gb=peak / 1e9,
        fits=peak <= card.limit_bytes,
        memory_gb=card.limit_bytes / 1e9,
        modes={way: _mode(case, way) for way in _WAYS},
        steps=steps,
        hours_per_epoch=seconds.total * float(epoch) / 3600 if seconds else None,
        hours=_hours(seconds, steps, validation, previews),
        validation=validation,
        previews=previews,
        stage_one_hours=_encode_hours(case),
        cache_gb=_cache_bytes(case) / 1e9,
        checkpoints_gb=checkpoint_bytes(trained, checkpoints) / 1e9,
        untrained=describe_untrained(case.order, case.buckets, batch_sizes, end_step=steps),
        too_short=describe_short_run(
            steps,
            steps_per_epoch=epoch,
            draws_per_epoch=case.order.draws_per_epoch,
            num_epochs=config.num_epochs,
            accumulation=config.gradient_accumulation_steps,
            num_processes=config.num_processes,
        ),
        assumed=_assumed(gpu, measured=case.trial is not None),
        probe=asdict(case.trial) if case.trial else None,
    )


def _pause(case: Case, passes: Passes) -> Pause:
    hours = passes.seconds(case.forward_seconds) / 3600 if case.is_timed else None
    return Pause(passes.times, passes.total, hours)


def _hours(seconds: Seconds | None, steps: int, *pauses: Pause) -> float | None:
    if seconds is None:
        return None
    return seconds.total * steps / 3600 + sum(pause.hours or 0.0 for pause in pauses)


def _batch(case: Case, bucket: Bucket, modes: Modes) -> Batch:
    size, pace = case.sizes[bucket], case.pace(modes)
    return Batch(
        clips=size.global_batch,
        micro_batch=size.micro_batch,
        tflop=case.config.num_processes * case.in_a_step(bucket, model_flops) / 1e12,
        seconds=case.in_a_step(bucket, lambda work: pace(work).total) if pace else None,
        peak_gb=step_bytes(case.works[bucket], modes).total / 1e9,
    )


def _mode(case: Case, way: Recompute) -> Mode:
    modes: Modes = (way,) * case.work.shape.num_layers
    peak, seconds = step_bytes(case.work, modes).total, case.seconds(modes)
    longest = longest_clip(case.work, case.largest, way, case.card.limit_bytes)
    return Mode(
        peak_gb=peak / 1e9,
        fits=peak <= case.card.limit_bytes,
        seconds_per_step=seconds.total if seconds else None,
        longest=longest.num_frames if longest else None,
    )


def _encode_hours(case: Case) -> float | None:
    gpu = case.card.gpu
    if gpu is None or case.variant.name == "micro":  # its encoders are not Wan's
        return None
    return sum(encode_seconds(*b, gpu) * n for b, n in case.to_encode.items()) / 3600


def _cache_bytes(case: Case) -> float:
    if case.config.cache:
        return storage.num_bytes(case.config.cache, schema.STORE)
    return cache_bytes(
        case.to_encode,
        TOKENS_PER_CAPTION * case.to_encode.total(),
        z_dim=case.variant.z_dim,
        text_dim=case.variant.text_dim,
    )


def _num_checkpoints(steps: int, *, save_steps: int, keep_checkpoints: int) -> int:
    """Checkpoints that a run keeps."""
    saved = steps // save_steps + 1 if save_steps else 1
    return min(saved, keep_checkpoints or saved)


def _assumed(gpu: Gpu | None, *, measured: bool) -> dict[str, str]:
    if gpu is None:
        return {} if measured else {"time": "not predicted: no rates of this GPU are known"}
    encode = {"VAE": f"{VAE_SHARE_OF_PEAK:.0%} of the bf16 peak in fp32 with TF32"}
    if measured:
        return encode
    return {
        "attention": f"{gpu.attention_forward:.0%} of {gpu.peak_flops / 1e12:.4g} TFLOP/s forward, "
        f"{gpu.attention_backward:.0%} backward",
        "matrix products": f"{gpu.matmul:.0%}",
        "the rest": f"{gpu.stream:.0%} of {gpu.bandwidth / 1e12:.3g} TB/s",
        "launches": "not counted; very short clips take longer than this",
        **encode,
    }


def _words(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else ", ".join(names)
