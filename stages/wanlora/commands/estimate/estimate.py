"""`wanlora estimate`: seconds, hours, memory and disk of a run, counted before a GPU is used.

Owns: the order: select clips, model and card; measure them if a probe is requested; count. Without
a probe it must not import torch.
"""

from dataclasses import replace

from wanlora.commands.estimate.cards import fits_of_cards
from wanlora.commands.estimate.case import Case
from wanlora.commands.estimate.figures import estimate_result
from wanlora.commands.estimate.pauses import preview_passes, validation_passes
from wanlora.commands.estimate.setup import open_case
from wanlora.commands.estimate.table import EstimateResult
from wanlora.config import EstimateConfig
from wanlora.cost.planning import fastest_plan
from wanlora.cost.streaming import require_blocks
from wanlora.training.workload import Modes, Trial


def run(config: EstimateConfig) -> EstimateResult:
    """Count what a run takes, and predict or measure its seconds.

    Raises:
        ConfigError: No GPU of that name is known, and no probe was requested.
        StoreError: There is no such cache or view.
        DeviceError: The device to probe does not work, or nothing fits into its memory.
    """
    case = open_case(config)
    if config.probe:
        case = replace(case, trial=_probe(config, case))
    if case.trial:
        modes = case.trial.modes
    else:
        case, modes = _planned(case, config)
    validation, previews = config.validation, config.previews
    return estimate_result(
        case,
        modes,
        adapter=f"rank {config.lora.rank} on {_words(config.lora.targets)}",
        validation=validation_passes(
            case.view, case.buckets,
            splits=[validation.split, "train"] if validation.train_clips else [validation.split],
            num_clips=validation.num_clips, num_sigmas=validation.num_sigmas,
            every=validation.every, end_step=case.steps, num_ranks=config.num_processes,
        ),
        previews=preview_passes(
            case.buckets.elements(), case.variant,
            num_prompts=len(previews.prompts) or previews.num_prompts,
            denoising_steps=previews.steps,
            every=previews.period(case.steps), end_step=case.steps,
        ),
        num_checkpoints=_num_checkpoints(
            case.steps, save_steps=config.save_steps, keep_checkpoints=config.keep_checkpoints
        ),
        accumulation=config.gradient_accumulation_steps,
        cards=(
            fits_of_cards(rank=config.lora.rank, adapted=config.lora.targets)
            if config.cards
            else None
        ),
    )  # fmt: skip


def _probe(config: EstimateConfig, case: Case) -> Trial:
    """Measure the largest micro-batch on a device of this machine."""
    from wanlora.adapters.file import LoraShape  # noqa: PLC0415  (imports torch)
    from wanlora.commands.estimate.probe import probe  # noqa: PLC0415  (imports torch, diffusers)

    lora = config.lora
    return probe(
        case,
        config.model or (case.view.model if case.view else None),
        LoraShape(lora.rank, lora.alpha or lora.rank, lora.targets, lora.rslora, lora.dora),
        activations=config.activations,
        kernel=config.attention,
    )


def _planned(case: Case, config: EstimateConfig) -> tuple[Case, Modes]:
    """Activation modes and streamed blocks: the settings, or the fastest ones that fit."""
    layers = case.work.shape.num_layers
    if config.stream_blocks != "auto":
        require_blocks(layers, config.stream_blocks)
    chosen = fastest_plan(
        case.work, case.card.limit_bytes, case.card.gpu,
        modes=None if config.activations == "auto" else (config.activations,) * layers,
        num_streamed=None if config.stream_blocks == "auto" else config.stream_blocks,
    )  # fmt: skip
    works = {
        bucket: replace(work, num_streamed=chosen.num_streamed)
        for bucket, work in case.works.items()
    }
    return replace(case, works=works), chosen.modes


def _num_checkpoints(steps: int, *, save_steps: int, keep_checkpoints: int) -> int:
    """Checkpoints that a run keeps."""
    saved = steps // save_steps + 1 if save_steps else 1
    return min(saved, keep_checkpoints or saved)


def _words(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else ", ".join(names)
