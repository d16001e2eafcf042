"""Set up a run. Checks run first, cheapest first.

Owns: the order of checks, and the use of each setting. `loop` has the training loop.
Must not import the VAE, the text encoder, any pipeline or any video code.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from wanlora.commands.train import start_log
from wanlora.commands.train.base_model import Base, find_base
from wanlora.commands.train.data import Data, read_fixed_rows
from wanlora.commands.train.first_weights import check_base
from wanlora.commands.train.identity import identity_of, provenance, shared_facts
from wanlora.commands.train.kernel import attention_shape, select_kernel
from wanlora.commands.train.opening_data import open_data
from wanlora.commands.train.opening_model import load_model, plan_step
from wanlora.commands.train.prompts import PreviewPrompt, preview_prompts
from wanlora.commands.train.selection import Selection
from wanlora.commands.train.session import (
    PreviewPlan,
    Run,
    SavingPlan,
    Session,
    TrainedModel,
    ValidationPlan,
)
from wanlora.config import TrainConfig
from wanlora.config.run_settings import from_recorded, recorded_settings
from wanlora.core.buckets import usual
from wanlora.errors import ConfigError, RunError
from wanlora.progress import waiting
from wanlora.runs import checkpoints, claim, run_folder
from wanlora.runs.checkpoints import Progress
from wanlora.runs.record import check_trackers
from wanlora.training.distributed import Ranks, prepare_process
from wanlora.training.kernel_probe import KernelChoice
from wanlora.training.optimizers import rate_of
from wanlora.training.order import num_steps
from wanlora.training.schedule import default_warmup
from wanlora.training.validation import panel_facts
from wanlora.training.workload import is_compiled
from wanlora.wan import attention
from wanlora.wan import device as devices
from wanlora.wan.quantize import require_compilable
from wanlora.wan.variants import Variant

logger = logging.getLogger(__name__)


def open_session(config: TrainConfig, selection: Selection) -> Session:
    """Check everything that can be checked, then load the transformer and the adapter.

    Args:
        config: The settings.
        selection: The clips to train on, from `preflight.check`.

    Raises:
        WanloraError: The run is impossible or pointless with these settings.
    """
    check_trackers(config.trackers)
    attention.require_native_dispatch()
    prepare_process()
    model_name = config.model or selection.view.model
    device = devices.select_device(config.device, model_name)
    base = find_base(model_name, config.expert)
    config.check_model(base.variant)
    data = open_data(config, base.variant, selection)
    ranks = _start_processes(config, device)
    end_step = _num_steps(config, data)
    if ranks.is_main:
        devices.warn_of_toy(model_name)
        _log_start(config, base, data, end_step, ranks.count)
    checkpoint = _open_folder(config, data, ranks)
    warmup_steps = ranks.from_main(lambda: _warmup_steps(config, checkpoint, end_step))
    previews = _plan_previews(config, data, ranks, end_step)  # may encode prompts: before the load
    kernel = ranks.from_main(lambda: _select_kernel(config, base.variant, data, ranks, checkpoint))
    model = load_model(
        config, base, ranks, data=data, kernel=kernel, from_checkpoint=checkpoint is not None
    )
    identity = identity_of(
        data.view, variant=model.variant, base=model.base, expert=model.part.expert,
        quantize=model.quantize,
    )  # fmt: skip
    progress = _load_checkpoint(config, checkpoint, identity, model)
    _require_same_run(config, data, ranks, identity, end_step, model)
    step_plan = plan_step(config, model, data, ranks)
    if checkpoint is None and not config.allow_untrained_base:
        _check_base(model, data, ranks)
    run = Run(
        folder=config.output_dir, settings=_settings_to_record(config, warmup_steps),
        facts=provenance(data, model=model_name, identity=identity), identity=identity,
        checkpoint=checkpoint, progress=progress, end_step=end_step,
        schedule=config.optimizer.schedule, warmup_steps=warmup_steps, trackers=config.trackers,
        saving=_plan_saving(config), previews=previews,
        validation=_plan_validation(config, model, data, ranks, checkpoint),
    )  # fmt: skip
    return Session(model, data, step_plan, run, ranks)


def _start_processes(config: TrainConfig, device: torch.device) -> Ranks:
    """Join the processes of the run.

    Raises:
        ConfigError: They cannot share a step evenly.
        DeviceError: The compiled blocks cannot be deterministic with this torch, or cannot have
            8-bit weights on this GPU.
    """
    compiled = is_compiled(config.eager, device.type, dora=config.lora.dora)
    if compiled:
        require_compilable(config.quantize, device)
    if config.deterministic:
        devices.use_deterministic_algorithms(compiled=compiled)
    ranks = Ranks(device, timeout_s=config.process_timeout_s)
    require_even_shares(config.batch_size, config.gradient_accumulation_steps, ranks.count)
    return ranks


def _num_steps(config: TrainConfig, data: Data) -> int:
    """Steps of the whole run."""
    steps_per_epoch = data.source.order.steps_per_epoch
    return config.max_steps or num_steps(steps_per_epoch, num_epochs=config.num_epochs)


def _select_kernel(
    config: TrainConfig, variant: Variant, data: Data, ranks: Ranks, checkpoint: Path | None
) -> KernelChoice:
    dtype = devices.base_dtype(config.dtype, ranks.device)
    shape = attention_shape(variant, data, dtype=dtype, device=ranks.device)
    return select_kernel(config.attention, shape, checkpoint, deterministic=config.deterministic)


def require_even_shares(batch_size: int, accumulation: int, world: int) -> None:
    """Check that some processes can share a step's micro-batches evenly.

    Args:
        batch_size: Clips per micro-batch.
        accumulation: Micro-batches per step.
        world: Number of processes.

    Raises:
        ConfigError: They cannot.
    """
    if accumulation % world:
        raise ConfigError(
            f"a global batch of {batch_size * accumulation} clips (batch_size {batch_size} x "
            f"gradient_accumulation_steps {accumulation}) cannot be shared by {world} processes: "
            f"make gradient_accumulation_steps a multiple of {world}"
        )


def _log_start(
    config: TrainConfig, base: Base, data: Data, end_step: int, num_processes: int
) -> None:
    start_log.log_sigmas(data.source, base, origin=_origin_of_shift(config, base.variant, data))
    start_log.log_steps(
        data, end_step=end_step, batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps, num_processes=num_processes,
    )  # fmt: skip
    start_log.log_draws(data, balance_activities=config.balance_activities, end_step=end_step)
    start_log.warn_of_images(data, base.variant)
    start_log.warn_of_short_run(
        data.source.order, end_step=end_step,
        num_epochs=None if config.max_steps else config.num_epochs,
        accumulation=config.gradient_accumulation_steps, num_processes=num_processes,
    )  # fmt: skip
    if config.validation.every:
        start_log.warn_of_few_groups(data, split=config.validation.split)


def _origin_of_shift(config: TrainConfig, variant: Variant, data: Data) -> str:
    if config.flow.shift is not None:
        return "flow.shift"
    if data.usual_shift == variant.shift_of(usual(clip.bucket for clip in data.clips)):
        return f"of {variant.name} for clips of this size"
    return "of the run so far"


def _open_folder(config: TrainConfig, data: Data, ranks: Ranks) -> Path | None:
    """Check the run's folder on the main process; all ranks continue from the same checkpoint."""

    def resolve(recorded: dict[str, Any]) -> dict[str, Any]:
        return _resolved(from_recorded(config.output_dir, recorded), data, ranks.device)

    def check() -> Path | None:
        settings = _settings_to_record(config, _recorded_warmup(config))
        return claim.open_run(config.output_dir, settings, resume=config.resume, resolve=resolve)

    newest = ranks.from_main(check)
    if newest is None:
        return None
    checkpoint = config.output_dir / run_folder.CHECKPOINTS_NAME / newest.name
    if not checkpoint.is_dir():
        raise RunError(
            f"process 0 continues from {newest}, and there is no {checkpoint.absolute()} on this "
            "node: --output-dir must be a folder that all nodes see"
        )
    return checkpoint


def _settings_to_record(config: TrainConfig, warmup_steps: int | None) -> dict[str, Any]:
    settings = recorded_settings(config)
    settings["optimizer"]["warmup_steps"] = warmup_steps
    return settings


def _resolved(config: TrainConfig, data: Data, device: torch.device) -> dict[str, Any]:
    """Settings with the values of those that are None or auto, so equal runs have equal ones."""
    settings = recorded_settings(config)
    settings["model"] = config.model or data.view.model
    dtype = devices.base_dtype(config.dtype, device)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings["learning_rate"] = rate_of(config.optimizer.name, config.learning_rate)
    settings["lora"]["alpha"] = config.lora.alpha or float(config.lora.rank)
    settings["flow"]["shift"] = config.flow.shift or data.usual_shift
    return settings


def _recorded_warmup(config: TrainConfig) -> int | None:
    """Steps of warm-up: as set, or as the folder's run recorded them; None without both."""
    if config.optimizer.warmup_steps is not None:
        return config.optimizer.warmup_steps
    recorded: int | None = (
        run_folder.read_settings(config.output_dir).get("optimizer", {}).get("warmup_steps")
    )
    return recorded


def _warmup_steps(config: TrainConfig, checkpoint: Path | None, end_step: int) -> int:
    """Steps of warm-up. More steps later do not change them: past learning rates stay the same."""
    known = _recorded_warmup(config) if checkpoint else config.optimizer.warmup_steps
    steps = default_warmup(end_step) if known is None else known
    if steps >= end_step:
        logger.warning(
            "the warm-up of %d steps does not end in a run of %d: the learning rate stays below "
            "its peak. Leave out optimizer.warmup_steps for a warm-up of %d",
            steps, end_step, default_warmup(end_step),
        )  # fmt: skip
    return steps


def _plan_previews(config: TrainConfig, data: Data, ranks: Ranks, end_step: int) -> PreviewPlan:
    """Read the rows that validations and previews use; all processes get the prompts."""
    every, settings = config.previews.period(end_step), config.previews

    def read() -> tuple[PreviewPrompt, ...]:
        read_fixed_rows(data)
        if not every:
            return ()
        data.source.reader.latent_rgb()  # refused now if no segment has a projection
        return tuple(
            preview_prompts(
                data, settings.prompts, num_prompts=settings.num_prompts, model=config.model,
                device=ranks.device,
            )
        )  # fmt: skip

    return PreviewPlan(every, settings.steps, ranks.from_main(read))


def _load_checkpoint(
    config: TrainConfig, checkpoint: Path | None, identity: dict[str, Any], model: TrainedModel
) -> Progress:
    """Load the state of masters, average and optimizer from the checkpoint, if there is one."""
    if checkpoint is None:
        if config.resume:
            logger.info("%s has no checkpoint to resume: starting at step 0", config.output_dir)
        return Progress()
    progress = checkpoints.load(
        checkpoint, identity=identity, masters=model.masters, average=model.average,
        optimizer=model.optimizer,
    )  # fmt: skip
    logger.info("continuing from %s: step %d comes next", checkpoint, progress.step)
    return progress


def _require_same_run(
    config: TrainConfig,
    data: Data,
    ranks: Ranks,
    identity: dict[str, Any],
    end_step: int,
    model: TrainedModel,
) -> None:
    """Check that all processes train the same run, with the same data and weights."""
    if ranks.count > 1:
        settings = _resolved(config, data, ranks.device)
        facts = shared_facts(settings, identity, end_step=end_step, masters=model.masters)
        ranks.require_same(facts)


def _check_base(model: TrainedModel, data: Data, ranks: Ranks) -> None:
    """Check that the base predicts better than chance; the micro models have no limit."""
    limit = model.part.max_base_loss
    if limit is not None:
        with waiting("measuring the base model on a few clips", shown=ranks.is_main):
            check_base(model, data, limit)


def _plan_saving(config: TrainConfig) -> SavingPlan:
    return SavingPlan(
        every=config.save_steps,
        every_minutes=config.save_minutes,
        every_epoch=config.save_every_epoch,
        keep=config.keep_checkpoints,
    )


def _plan_validation(
    config: TrainConfig, model: TrainedModel, data: Data, ranks: Ranks, checkpoint: Path | None
) -> ValidationPlan:
    facts = panel_facts(
        data.view, model.base, kinds=model.variant.kinds, dtype=model.dtype, device=model.device,
        quantize=model.quantize,
    )  # fmt: skip
    return ValidationPlan(
        every=config.validation.every,
        patience=config.validation.patience,
        panel_keys={panel.name: panel.key(data.source, facts) for panel in data.panels},
        base_losses=ranks.from_main(lambda: _read_base_losses(config.output_dir, checkpoint)),
    )


def _read_base_losses(run_dir: Path, checkpoint: Path | None) -> dict[str, list[list[float]]]:
    """Base losses that this run has measured; empty without a checkpoint."""
    path = run_dir / run_folder.BASE_LOSSES_NAME
    if checkpoint is None or not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        logger.warning("%s is damaged (%s): the base is measured again", path, error)
        return {}
