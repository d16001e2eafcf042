"""Figures of an estimate: the fields of its result.

Owns: hours, bytes and FLOPs of the run from those of its steps. Bytes and FLOPs are counted
(`cost.memory`, `cost.flops`), seconds follow from published rates (`cost.gpus`) or from a probe.
Must not know: settings, torch.
"""

from dataclasses import asdict
from typing import get_args

from wanlora.commands.estimate.cards import CardFit
from wanlora.commands.estimate.case import Case
from wanlora.commands.estimate.pauses import Passes
from wanlora.commands.estimate.table import Batch, EstimateResult, Mode, Pause
from wanlora.core.buckets import Bucket
from wanlora.cost.flops import Recompute
from wanlora.cost.gpus import Gpu
from wanlora.cost.memory import Workload, host_bytes, longest_clip, num_trained, step_bytes
from wanlora.cost.seconds import (
    VAE_SHARE_OF_PEAK,
    Seconds,
    all_reduce_bytes,
    encode_seconds,
    floor_seconds,
    model_flops,
)
from wanlora.cost.sizes import TOKENS_PER_CAPTION, cache_bytes, checkpoint_bytes
from wanlora.cost.streaming import PCIE_BYTES_PER_S
from wanlora.store import schema, storage
from wanlora.training.order import describe_untrained
from wanlora.training.schedule import describe_short_run
from wanlora.training.workload import Modes, describe

_RECOMPUTE_MODES: tuple[Recompute, ...] = get_args(Recompute)


def estimate_result(
    case: Case,
    modes: Modes,
    *,
    adapter: str,
    validation: Passes,
    previews: Passes,
    num_checkpoints: int,
    accumulation: int,
    cards: list[CardFit] | None,
) -> EstimateResult:
    """Calculate the fields of the result.

    Args:
        case: Clips, model, card and batch sizes.
        modes: Activation mode of each block.
        adapter: The adapter in words.
        validation: Forward passes of validation.
        previews: Forward passes of previews.
        num_checkpoints: Checkpoints that the run keeps.
        accumulation: Micro-batches of a step over all processes, for the advice on short runs.
        cards: Plans for other cards, if they were requested.
    """
    card, work, gpu = case.card, case.work, case.card.gpu
    seconds, flops = case.seconds(modes), case.mean(model_flops)
    epoch, steps = case.steps_per_epoch, case.steps
    pauses = [_pause(case, validation), _pause(case, previews)]
    num_experts, hours = len(case.variant.transformers), _hours(seconds, steps, *pauses)
    trained, peak = num_trained(work.shape, work.adapted, work.rank), step_bytes(work, modes).total
    return EstimateResult(
        variant=case.variant.name, expert=case.expert, num_experts=num_experts, gpu=card.name,
        measured=case.trial is not None,
        buckets={str(bucket): number for bucket, number in sorted(case.buckets.items())},
        lora=adapter, trained_parameters=trained,
        batches={str(bucket): _batch(case, bucket, modes) for bucket in case.sizes},
        clips_per_step=float(case.order.draws_per_epoch / epoch), num_processes=case.num_processes,
        sent_bytes_per_step=all_reduce_bytes(trained, case.num_processes),
        tflop_per_step=case.num_processes * flops / 1e12,
        floor_s=case.mean(lambda item: floor_seconds(item, gpu)) if gpu else None,
        seconds_per_step=seconds.total if seconds else None,
        parts=_parts(seconds) if seconds and gpu else {},
        mfu=flops / seconds.total / gpu.peak_flops if seconds and gpu else None,
        activations=describe(modes), quantize=work.quantize, num_streamed=work.num_streamed,
        host_gb=host_bytes(work) / 1e9, steps=steps,
        peak_gb=peak / 1e9, fits=peak <= card.limit_bytes, memory_gb=card.limit_bytes / 1e9,
        modes={name: _mode(case, name) for name in _RECOMPUTE_MODES},
        hours_per_epoch=seconds.total * float(epoch) / 3600 if seconds else None,
        hours=hours, hours_of_experts=hours * num_experts if hours is not None else None,
        validation=pauses[0], previews=pauses[1],
        stage_one_hours=_encode_hours(case), cache_gb=_cache_bytes(case) / 1e9,
        checkpoints_gb=checkpoint_bytes(trained, num_checkpoints) / 1e9,
        untrained=_untrained(case), too_short=_too_short(case, accumulation),
        assumed=_assumed(gpu, work, measured=case.trial is not None),
        probe=asdict(case.trial) if case.trial else None,
        cards=cards,
    )  # fmt: skip


def _parts(seconds: Seconds) -> dict[str, float]:
    """Seconds by kind of work; copies only if blocks are streamed."""
    parts = asdict(seconds)
    return parts if seconds.copies else {k: v for k, v in parts.items() if k != "copies"}


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
        tflop=case.num_processes * case.in_a_step(bucket, model_flops) / 1e12,
        seconds=case.in_a_step(bucket, lambda work: pace(work).total) if pace else None,
        peak_gb=step_bytes(case.works[bucket], modes).total / 1e9,
    )


def _mode(case: Case, name: Recompute) -> Mode:
    modes: Modes = (name,) * case.work.shape.num_layers
    peak, seconds = step_bytes(case.work, modes).total, case.seconds(modes)
    longest = longest_clip(case.work, case.largest, name, case.card.limit_bytes)
    return Mode(
        peak_gb=peak / 1e9,
        fits=peak <= case.card.limit_bytes,
        seconds_per_step=seconds.total if seconds else None,
        longest=longest.num_frames if longest else None,
    )


def _encode_hours(case: Case) -> float | None:
    gpu = case.card.gpu
    if gpu is None or case.variant.is_micro:  # its encoders are not Wan's
        return None
    is_i2v = case.variant.is_i2v
    seconds = (
        encode_seconds(*bucket, gpu, has_condition=is_i2v) * number
        for bucket, number in case.to_encode.items()
    )
    return sum(seconds) / 3600


def _cache_bytes(case: Case) -> float:
    """Bytes of the store: measured if it exists, else estimated."""
    if case.cache:
        return storage.num_bytes(case.cache, schema.STORE)
    variant, shape = case.variant, case.variant.shape
    return cache_bytes(
        case.to_encode,
        TOKENS_PER_CAPTION * case.to_encode.total(),
        z_dim=variant.vae.z_dim,
        text_dim=shape.text_dim,
        has_condition=variant.is_i2v,
        image_values=shape.num_image_tokens * (shape.image_dim or 0),
    )


def _untrained(case: Case) -> list[str]:
    sizes = {bucket: size.global_batch for bucket, size in case.sizes.items()}
    return describe_untrained(case.order, case.buckets, sizes, end_step=case.steps)


def _too_short(case: Case, accumulation: int) -> str | None:
    return describe_short_run(
        case.steps,
        steps_per_epoch=case.steps_per_epoch,
        draws_per_epoch=case.order.draws_per_epoch,
        num_epochs=case.num_epochs,
        accumulation=accumulation,
        num_processes=case.num_processes,
    )


def _assumed(gpu: Gpu | None, work: Workload, *, measured: bool) -> dict[str, str]:
    if gpu is None:
        return {} if measured else {"time": "not predicted: no rates of this GPU are known"}
    encode = {"VAE": f"{VAE_SHARE_OF_PEAK:.0%} of the bf16 peak in fp32 with TF32"}
    if measured:
        return encode
    if work.num_streamed:
        encode = {"copies": f"{PCIE_BYTES_PER_S / 1e9:g} GB/s from host memory", **encode}
    return {
        "attention": f"{gpu.attention_forward:.0%} of {gpu.peak_flops / 1e12:.4g} TFLOP/s forward, "
        f"{gpu.attention_backward:.0%} backward",
        "matrix products": f"{gpu.matmul:.0%}",
        "the rest": f"{gpu.stream:.0%} of {gpu.bandwidth / 1e12:.3g} TB/s",
        "launches": "not counted; very short clips take longer than this",
        **encode,
    }
