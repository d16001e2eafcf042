"""Everything a run needs before its first step: refusals first, cheap ones before dear ones.

Owns: the order of checks, and what is built from which setting. The loop itself is in `loop`.
Must not import the VAE, the text encoder, any pipeline or any video code.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from wanlora import __version__
from wanlora.adapters.file import LoraShape, lora_metadata, read_adapter
from wanlora.adapters.lora import add_adapter, check_adapter_fits, initial_values
from wanlora.adapters.updates import scale_of
from wanlora.commands.train.data import Data, log_draws, open_data, read_fixed_rows, warn_of_little
from wanlora.commands.train.opening import log_adapter, log_steps
from wanlora.commands.train.prompts import PreviewPrompt, preview_prompts
from wanlora.commands.train.resume import recorded_settings, settings_of
from wanlora.config import TrainConfig
from wanlora.core.buckets import Bucket, usual
from wanlora.cost.memory import Workload, uploaded_bytes
from wanlora.cost.seconds import model_flops
from wanlora.errors import AdapterError, CheckpointError, ConfigError, ModelError, RunError
from wanlora.progress import waiting
from wanlora.runs import checkpoints, claim, run_folder
from wanlora.runs.checkpoints import Progress
from wanlora.runs.git import git_commit
from wanlora.store.views import View, frame_rate
from wanlora.training import fitting
from wanlora.training.distributed import Ranks, prepare_process
from wanlora.training.masters import Masters, MovingAverage
from wanlora.training.optimizers import make_optimizer, missing_bytes, rate_of
from wanlora.training.order import num_steps
from wanlora.training.schedule import default_warmup
from wanlora.training.validation import losses, make_panel, panel_facts
from wanlora.training.workload import Trial, is_compiled, largest, workload
from wanlora.wan import attention
from wanlora.wan import device as devices
from wanlora.wan.model_folder import resolve
from wanlora.wan.transformer import base_fingerprint, load_transformer
from wanlora.wan.variants import Variant, variant_of

BASE_CHECK_PAIRS = 8

OF_A_NODE = ("cache", "output_dir", "model", "manifest", "init_adapter", "local_copy", "device")
"""Settings that name places and may differ between nodes; what is found there may not."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What the loop moves.

    Attributes:
        work: The micro-batch that takes the most memory.
        trial: What it took, and how the blocks run since.
        slots: This rank's slots of each bucket's global batch, a tuple for each micro-batch.
        end_step: Steps run up to, not including, this one.
        warmup_steps: Steps of warm-up; a run that continues keeps its own.
        identity: What a checkpoint is compared with before it is continued.
        facts: Where the adapter comes from; written into its header.
        panel_keys: Key of each panel, by its name.
        base_losses: The base's losses by panel key, measured once.
        preview_every: Steps between previews; 0 = never.
        prompts: Prompts of previews.
    """

    transformer: Any
    variant: Variant
    work: Workload
    trial: Trial
    shape: LoraShape
    masters: Masters
    average: MovingAverage | None
    optimizer: torch.optim.Optimizer
    data: Data
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    slots: dict[Bucket, tuple[tuple[int, ...], ...]]
    progress: Progress
    end_step: int
    warmup_steps: int
    checkpoint: Path | None
    identity: dict[str, Any]
    facts: dict[str, str]
    panel_keys: dict[str, str]
    base_losses: dict[str, list[list[float]]]
    preview_every: int
    prompts: tuple[PreviewPrompt, ...]

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.ranks.is_main

    def bucket(self, step: int) -> Bucket:
        """Bucket of a step's clips, the same on every rank."""
        return self.data.source.order.batch(step).bucket

    def num_clips(self, step: int) -> int:
        """Clips in a step's global batch, over all ranks."""
        return self.data.sizes[self.bucket(step)].global_batch


def open_session(config: TrainConfig, view: View) -> Session:
    """Check everything that can be checked, then load the transformer and the adapter.

    Args:
        config: The settings.
        view: The cache's view, from `preflight.check`.

    Raises:
        WanloraError: The run is impossible or pointless as asked for.
    """
    model = config.model or view.model
    attention.require_native_dispatch()
    prepare_process()
    device = devices.select_device(config.device, model)
    folder = resolve(model, ["transformer"])
    variant = variant_of(folder)
    data = open_data(config, variant, view)
    if config.deterministic:
        _be_deterministic()
    ranks = Ranks(device, timeout_s=config.process_timeout_s)
    _require_shares(config, ranks.count)
    slots = {
        bucket: size.slots(rank=ranks.index, world=ranks.count)
        for bucket, size in data.sizes.items()
    }
    end_step = config.max_steps or num_steps(
        data.source.order.steps_per_epoch, num_epochs=config.num_epochs
    )
    if ranks.is_main:
        devices.warn_of_toy(model)
        log_steps(config, data, end_step=end_step, num_processes=ranks.count)
        log_draws(config, data, end_step=end_step)
        warn_of_little(config, data, end_step=end_step, num_processes=ranks.count)
    device = ranks.device
    dtype = devices.base_dtype(config.dtype, device)
    checkpoint = _open_run(config, view, ranks)
    warmup_steps = ranks.from_main(lambda: _warmup_steps(config, checkpoint, end_step))
    preview_every = config.previews.period(end_step)
    prompts = ranks.from_main(lambda: _read_rows(config, data, device, previews=preview_every > 0))

    with waiting(f"loading the transformer in {folder}", shown=ranks.is_main):
        transformer = load_transformer(folder, dtype=dtype, device=device)
    base = base_fingerprint(transformer)
    identity = data.identity(variant, base)
    facts = _facts(config, data, model, identity)
    at_panel = panel_facts(view, base, dtype=dtype, device=device)
    shape = LoraShape(
        rank=config.lora.rank,
        alpha=config.lora.alpha or config.lora.rank,
        targets=config.lora.targets,
        rslora=config.lora.rslora,
        dora=config.lora.dora,
    )
    adapter = add_adapter(transformer, shape, seed=config.seed)
    masters = Masters(adapter)
    masters.load(initial_values(adapter, config.seed))
    if config.init_adapter and not checkpoint:
        _start_from(config.init_adapter, shape, transformer, masters)
    if ranks.is_main:
        log_adapter(config, transformer, masters, dtype=dtype, device=device)
    average = MovingAverage(masters, config.ema_decay) if config.ema_decay else None
    optimizer = make_optimizer(
        masters.parameters,
        name=config.optimizer.name,
        learning_rate=rate_of(config.optimizer.name, config.learning_rate),
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )
    progress = _load(config, checkpoint, identity, masters, average, optimizer)
    if ranks.count > 1:
        ranks.require_same(_what_is_trained(config, view, device, identity, end_step, masters))
    work, trial = _fit(config, transformer, data, variant, masters, optimizer, device, dtype)
    if checkpoint is None and variant.max_base_loss is not None and not config.allow_untrained_base:
        with (
            waiting("measuring the base model on a few clips", shown=ranks.is_main),
            attention.pinned(config.attention, device),
        ):
            _check_base(transformer, data, variant.max_base_loss, device, dtype)
    return Session(
        transformer=transformer,
        variant=variant,
        work=work,
        trial=trial,
        shape=shape,
        masters=masters,
        average=average,
        optimizer=optimizer,
        data=data,
        ranks=ranks,
        device=device,
        dtype=dtype,
        slots=slots,
        progress=progress,
        end_step=end_step,
        warmup_steps=warmup_steps,
        checkpoint=checkpoint,
        identity=identity,
        facts=facts,
        panel_keys={panel.name: panel.key(data.source, at_panel) for panel in data.panels},
        base_losses=ranks.from_main(lambda: _read_base_losses(config, checkpoint)),
        preview_every=preview_every,
        prompts=prompts,
    )


def _load(
    config: TrainConfig,
    checkpoint: Path | None,
    identity: dict[str, Any],
    masters: Masters,
    average: MovingAverage | None,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Take masters, average and optimizer from the checkpoint, if there is one."""
    if checkpoint is None:
        if config.resume:
            logger.info("%s holds no checkpoint to resume: starting at step 0", config.output_dir)
        return Progress()
    progress = checkpoints.load(
        checkpoint, identity=identity, masters=masters, average=average, optimizer=optimizer
    )
    logger.info("continuing from %s: step %d comes next", checkpoint, progress.step)
    return progress


def _require_shares(config: TrainConfig, world: int) -> None:
    """Refuse a number of processes that cannot share a step's micro-batches evenly."""
    size, times = config.batch_size, config.gradient_accumulation_steps
    if times % world:
        raise ConfigError(
            f"a global batch of {size * times} clips (batch_size {size} x "
            f"gradient_accumulation_steps {times}) cannot be shared by {world} processes: make "
            f"gradient_accumulation_steps a multiple of {world}"
        )


def _open_run(config: TrainConfig, view: View, ranks: Ranks) -> Path | None:
    """Let the main process check the folder; every rank then continues from one checkpoint."""

    def resolve(recorded: dict[str, Any]) -> dict[str, Any]:
        return resolved(settings_of(config.output_dir, recorded), view, ranks.device)

    def check() -> Path | None:
        settings = recorded_settings(config)
        settings["optimizer"]["warmup_steps"] = _recorded_warmup(config)
        return claim.open_run(config.output_dir, settings, resume=config.resume, resolve=resolve)

    chosen = ranks.from_main(check)
    if chosen is None:
        return None
    checkpoint = config.output_dir / run_folder.CHECKPOINTS_NAME / chosen.name
    if not checkpoint.is_dir():
        raise RunError(
            f"process 0 continues from {chosen}, and there is no {checkpoint.absolute()} on this "
            "node: --output-dir must be a folder that all nodes see"
        )
    return checkpoint


def _recorded_warmup(config: TrainConfig) -> int | None:
    """Steps of warm-up as set, else those that the folder's run recorded, if there is one."""
    given = config.optimizer.warmup_steps
    if given is not None:
        return given
    recorded: int | None = (
        run_folder.read_settings(config.output_dir).get("optimizer", {}).get("warmup_steps")
    )
    return recorded


def _warmup_steps(config: TrainConfig, checkpoint: Path | None, end_step: int) -> int:
    """Steps of warm-up. More steps later do not change it: the past schedule stays as it was."""
    known = _recorded_warmup(config) if checkpoint else config.optimizer.warmup_steps
    steps = default_warmup(end_step) if known is None else known
    if steps >= end_step:
        logger.warning(
            "the warm-up of %d steps does not end in a run of %d: the learning rate stays below "
            "its peak. Leave out optimizer.warmup_steps for a warm-up of %d",
            steps, end_step, default_warmup(end_step),
        )  # fmt: skip
    return steps


def resolved(config: TrainConfig, view: View, device: torch.device) -> dict[str, Any]:
    """Settings with the values that stand for None and auto: equal runs have equal ones.

    Args:
        config: The settings.
        view: Gives the model and the shift of sigma.
        device: Decides the type of the base.
    """
    settings = recorded_settings(config)
    settings["model"] = config.model or view.model
    dtype = devices.base_dtype(config.dtype, device)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings["learning_rate"] = rate_of(config.optimizer.name, config.learning_rate)
    settings["lora"]["alpha"] = config.lora.alpha or float(config.lora.rank)
    settings["flow"]["shift"] = config.flow.shift or view.shift
    return settings


def _what_is_trained(
    config: TrainConfig,
    view: View,
    device: torch.device,
    identity: dict[str, Any],
    end_step: int,
    masters: Masters,
) -> dict[str, Any]:
    """Everything that must be equal in all processes, or their gradients are of different runs."""
    digest = hashlib.sha256()
    for master in masters.parameters.values():
        digest.update(master.detach().cpu().numpy().tobytes())
    settings = resolved(config, view, device)
    return {
        "settings": {key: settings[key] for key in settings if key not in OF_A_NODE},
        "wanlora": __version__,
        "end_step": end_step,
        "adapter": digest.hexdigest(),
        **identity,
    }


def _read_base_losses(config: TrainConfig, checkpoint: Path | None) -> dict[str, list[list[float]]]:
    """Base losses that this run has measured; none of an attempt that left no checkpoint."""
    path = config.output_dir / run_folder.BASE_LOSSES_NAME
    if checkpoint is None or not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        logger.warning("%s is damaged (%s): the base is measured again", path, error)
        return {}


def _read_rows(
    config: TrainConfig, data: Data, device: torch.device, *, previews: bool
) -> tuple[PreviewPrompt, ...]:
    """Read what validation needs, and the prompts of previews; other processes get a copy."""
    read_fixed_rows(config, data)
    if not previews:
        return ()
    data.source.reader.latent_rgb()  # refused now if no segment has a projection
    return tuple(preview_prompts(config, data, device))


def _be_deterministic() -> None:
    # Read when cuBLAS starts; without it deterministic matrix products are refused on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False
    from torch._inductor import config as inductor  # noqa: PLC0415  (slow, and rarely needed)

    if hasattr(inductor, "deterministic"):  # from torch 2.9 on: no choice of kernels by timing
        inductor.deterministic = True


def _start_from(path: Path, shape: LoraShape, transformer: Any, masters: Masters) -> None:
    """Begin with the weights of another adapter, of the same shape."""
    adapter = read_adapter(path)
    check_adapter_fits(adapter, transformer)
    wanted = lora_metadata(shape, (name.partition(".lora_")[0] for name in masters.parameters))
    differing = [
        f"{key}: found {adapter.metadata[key]}, wanted {value}"
        for key, value in wanted.items()
        if not key.endswith("target_modules") and adapter.metadata.get(key, value) != value
    ]
    scale = scale_of(shape.alpha, shape.rank, rslora=shape.rslora)
    found = {update.scale for update in adapter.updates().values()}
    if found != {scale}:  # also where rsLoRA or a module's own alpha makes the difference
        differing.append(f"scale of B A: found {sorted(found)}, wanted {scale}")
    try:
        if differing:
            raise CheckpointError("; ".join(differing))
        masters.load(adapter.tensors)
    except CheckpointError as error:
        raise AdapterError(
            f"init_adapter {adapter.path} is not of this run's shape: {error}. Set lora.rank, "
            "lora.alpha, lora.rslora and lora.targets as it was trained"
        ) from None


def _facts(config: TrainConfig, data: Data, model: str, identity: dict[str, Any]) -> dict[str, str]:
    """Where the adapter comes from. No clock: an equal run writes an equal file."""
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "peft", "numpy")}
    commit = git_commit(Path.cwd())
    return {
        "model": model,
        "wanlora": __version__,
        **versions,
        **({"git_commit": commit} if commit else {}),
        **{key: str(value) for key, value in identity.items()},
        "store_digest": data.source.reader.digest,
        "seed": str(config.seed),
        "fps": f"{frame_rate(data.clips):g}",
        **{name: str(size) for name, size in usual(c.bucket for c in data.clips)._asdict().items()},
    }


def _say_what_a_step_has(data: Data, works: Mapping[Bucket, Workload]) -> None:
    if len(data.sizes) > 1:
        number = Counter(clip.bucket for clip in data.clips)
        logger.info(
            "a step has clips of one bucket:\n%s",
            "\n".join(
                f"  {bucket}: {size.global_batch} of {number[bucket]:,}, {size.micro_batch} at "
                f"once, {size.num_micro_batches * model_flops(works[bucket]) / 1e12:.4g} TFLOP"
                for bucket, size in data.sizes.items()
            ),
        )


def _fit(
    config: TrainConfig,
    transformer: Any,
    data: Data,
    variant: Variant,
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Workload, Trial]:
    """Decide how blocks run by a trial of what is largest, so that memory runs out now or never."""
    compiled = is_compiled(config.eager, device.type, dora=config.lora.dora)
    works = {
        bucket: workload(
            variant,
            bucket,
            batch_size=size.micro_batch,
            rank=config.lora.rank,
            adapted=masters.modules,
            compiled=compiled,
            element_bytes=dtype.itemsize,
            num_uploaded=config.prefetch_batches + 1,
        )
        for bucket, size in data.sizes.items()
    }
    _say_what_a_step_has(data, works)
    bucket = largest(works)
    work = works[bucket]
    if work.compiled:
        logger.info("compiling the blocks; their kernels are kept for the next run")
    trial = fitting.fit(
        transformer, work, bucket, variant, activations=config.activations,
        kernel=config.attention, device=device, dtype=dtype, whole_card=config.deterministic,
        reserved_bytes=int(
            missing_bytes(optimizer, config.optimizer.name, masters.flat_gradient.numel())
            + uploaded_bytes(work)
        ),
    )  # fmt: skip
    fitting.say(trial, work, device)
    return work, trial


def _check_base(
    transformer: Any, data: Data, max_base_loss: float, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse a base that predicts no better than chance: wrong or half-loaded weights.

    Loss over target power on fixed pairs; noise - latents has power 1 + mean(latents^2), and
    predicting zero gives 1.
    """
    panel = make_panel("train", data.clips, data.source, num_clips=2, num_sigmas=4)
    assert panel
    found = losses(panel, transformer, data.source, device=device, dtype=dtype).mean()
    power = 1.0 + sum(
        float(data.source.latents(clip).square().mean()) for clip in panel.clips
    ) / len(panel.clips)
    if not found / power < max_base_loss:
        raise ModelError(
            f"the base model predicts no better than chance: its loss on {BASE_CHECK_PAIRS} fixed "
            f"pairs is {found / power:.2f} of the target's power, expected under {max_base_loss}. "
            "Its weights are probably incomplete or of another model; to train it all the same: "
            "--set allow_untrained_base=true"
        )
