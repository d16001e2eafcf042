"""Load the model of a run as its settings describe it, and try its largest micro-batch.

Owns: which setting decides what of the model, its optimizer and its blocks.
"""

import logging
from collections.abc import Collection

import torch

from wanlora.adapters.file import LoraShape
from wanlora.adapters.lora import add_adapter, initial_values
from wanlora.adapters.targets import linear_names, match_targets
from wanlora.commands.train import start_log
from wanlora.commands.train.base_model import Base
from wanlora.commands.train.data import Data
from wanlora.commands.train.first_weights import load_other_adapter
from wanlora.commands.train.session import StepPlan, TrainedModel
from wanlora.config import TrainConfig
from wanlora.core.buckets import Bucket
from wanlora.cost.memory import Workload, uploaded_bytes
from wanlora.progress import waiting
from wanlora.training import fitting
from wanlora.training.distributed import Ranks
from wanlora.training.kernel_probe import KernelChoice
from wanlora.training.masters import Masters, MovingAverage
from wanlora.training.optimizers import make_optimizer, missing_bytes, rate_of
from wanlora.training.workload import is_compiled, largest, workload
from wanlora.wan import device as devices
from wanlora.wan.base_fingerprint import base_fingerprint
from wanlora.wan.streaming import require_streaming, stream_blocks
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import Variant

logger = logging.getLogger(__name__)


def load_model(
    config: TrainConfig,
    base: Base,
    ranks: Ranks,
    *,
    data: Data,
    kernel: KernelChoice,
    from_checkpoint: bool,
) -> TrainedModel:
    """Load the transformer, and add the adapter with its first weights and its optimizer.

    Args:
        config: The settings.
        base: The model, and the transformer to train.
        ranks: Processes of the run.
        data: Clips of the run.
        kernel: Attention kernel.
        from_checkpoint: The first weights will be those of a checkpoint.

    Raises:
        WanloraError: The weights, the targets, the optimizer or `init_adapter` cannot be used.
    """
    device = ranks.device
    dtype = devices.base_dtype(config.dtype, device)
    weights = base.folder / base.part.subfolder
    num_streamed = number_of_streamed(config, base, data, ranks)
    with waiting(f"loading the transformer in {weights}", shown=ranks.is_main):
        transformer = load_transformer(
            base.folder, dtype=dtype, device=device, subfolder=base.part.subfolder,
            quantize=config.quantize, num_streamed=num_streamed,
        )  # fmt: skip
    fingerprint = base_fingerprint(transformer)
    lora, settings = config.lora, config.optimizer
    shape = LoraShape(lora.rank, lora.alpha or lora.rank, lora.targets, lora.rslora, lora.dora)
    adapter = add_adapter(transformer, shape, seed=config.seed)
    stream_blocks(transformer, num_streamed, device=device)
    masters = Masters(adapter)
    masters.load(initial_values(adapter, config.seed))
    if config.init_adapter and not from_checkpoint:
        load_other_adapter(config.init_adapter, shape, transformer, masters, base)
    if ranks.is_main:
        start_log.log_adapter(
            shape, transformer, masters, dtype=dtype, device=device, quantize=config.quantize
        )
    return TrainedModel(
        variant=base.variant,
        part=base.part,
        transformer=transformer,
        num_streamed=num_streamed,
        base=fingerprint,
        quantize=config.quantize,
        shape=shape,
        masters=masters,
        average=MovingAverage(masters, config.ema_decay) if config.ema_decay else None,
        optimizer=make_optimizer(
            masters.parameters, name=settings.name,
            learning_rate=rate_of(settings.name, config.learning_rate),
            betas=(settings.beta1, settings.beta2), eps=settings.eps,
            weight_decay=settings.weight_decay,
        ),
        optimizer_name=settings.name,
        max_grad_norm=settings.max_grad_norm,
        kernel=kernel,
        device=device,
        dtype=dtype,
    )  # fmt: skip


def number_of_streamed(config: TrainConfig, base: Base, data: Data, ranks: Ranks) -> int:
    """Number of blocks that are streamed, checked against the host memory of all processes.

    auto: on a GPU those of the fastest plan by counted memory; 0 if the model's own plan fits.

    Args:
        config: The settings.
        base: The model, and the transformer to train.
        data: Clips of the run.
        ranks: Processes of the run; those of a machine share its memory.

    Raises:
        ConfigError: The transformer has fewer blocks.
        DeviceError: The host memory is too small.
    """
    shape, device = base.variant.shape, ranks.device
    dtype = devices.base_dtype(config.dtype, device)
    num_streamed = 0 if config.stream_blocks == "auto" else config.stream_blocks
    if config.stream_blocks == "auto" and device.type == "cuda":
        linears = linear_names(shape.num_layers, reads_image=shape.image_dim is not None)
        adapted = match_targets(linears, config.lora.targets)
        works = _works(config, base.variant, data, device, adapted, dtype, 0)
        work = works[largest(works)]
        num_streamed = ranks.from_main(
            lambda: fitting.plan_streaming(
                work, device, activations=config.activations, whole_card=config.deterministic
            )
        )
    num_here = min(ranks.count, torch.cuda.device_count()) if device.type == "cuda" else 1
    require_streaming(shape, num_streamed, dtype, num_here, quantize=config.quantize)
    return num_streamed


def _works(
    config: TrainConfig,
    variant: Variant,
    data: Data,
    device: torch.device,
    adapted: Collection[str],
    dtype: torch.dtype,
    num_streamed: int,
) -> dict[Bucket, Workload]:
    """Describe the micro-batch of each bucket."""
    compiled = is_compiled(config.eager, device.type, dora=config.lora.dora)
    return {
        bucket: workload(
            variant, bucket, batch_size=size.micro_batch, rank=config.lora.rank, adapted=adapted,
            compiled=compiled, element_bytes=dtype.itemsize,
            num_uploaded=config.prefetch_batches + 1, quantize=config.quantize,
            num_streamed=num_streamed,
        )
        for bucket, size in data.sizes.items()
    }  # fmt: skip


def plan_step(config: TrainConfig, model: TrainedModel, data: Data, ranks: Ranks) -> StepPlan:
    """Decide how blocks run by a trial of the largest micro-batch.

    An out-of-memory error happens in this trial or never.

    Raises:
        NonFiniteError: A gradient is NaN or infinite.
        DeviceError: The micro-batch does not fit into memory, or cannot be computed here.
    """
    works = _works(
        config, model.variant, data, model.device, model.masters.modules, model.dtype,
        model.num_streamed,
    )  # fmt: skip
    start_log.log_batches(data, works)
    bucket = largest(works)
    work, num_parameters = works[bucket], model.masters.flat_gradient.numel()
    if work.compiled:
        logger.info("compiling the blocks; their kernels are kept for the next run")
    trial = fitting.fit(
        model.transformer, work, bucket, model.variant, activations=config.activations,
        kernel=model.kernel.name, device=model.device, dtype=model.dtype,
        whole_card=config.deterministic,
        reserved_bytes=int(
            missing_bytes(model.optimizer, model.optimizer_name, num_parameters)
            + uploaded_bytes(work)
        ),
    )  # fmt: skip
    fitting.log_trial(trial, work)
    slots = {
        bucket: size.slots(rank=ranks.index, world=ranks.count)
        for bucket, size in data.sizes.items()
    }
    return StepPlan(slots, work, trial, prefetch=config.prefetch_batches)
