"""Weights that a run starts from: the base, another adapter, or a checkpoint.

Owns: the check that the base model predicts better than chance, and that an adapter fits the run.
"""

import logging
from pathlib import Path
from typing import Any

from wanlora.adapters.file import LoraShape, load_adapter, lora_metadata
from wanlora.adapters.header import read_header
from wanlora.adapters.lora import check_adapter_fits
from wanlora.adapters.trained_on import check_kind, log_unknown_kind
from wanlora.adapters.updates import scale_of
from wanlora.commands.train.base_model import Base
from wanlora.commands.train.data import Data
from wanlora.commands.train.session import TrainedModel
from wanlora.errors import AdapterError, CheckpointError, ModelError
from wanlora.training.masters import Masters
from wanlora.training.validation import losses, make_panel
from wanlora.wan import attention
from wanlora.wan.variants import describe_range

logger = logging.getLogger(__name__)

NUM_CLIPS, NUM_SIGMAS = 2, 4
"""Fixed pairs on which the base is measured."""


def load_other_adapter(
    path: Path, shape: LoraShape, transformer: Any, masters: Masters, base: Base
) -> None:
    """Start from the weights of another adapter of the same shape.

    An adapter of the other expert is used, with a warning: it may be meant.

    Args:
        path: The adapter.
        shape: Shape of the run's adapter.
        transformer: The transformer with the run's adapter.
        masters: Receives the weights.
        base: The run's model, and the transformer that it trains.

    Raises:
        AdapterError: The file cannot be read, or the adapter has another shape or is for the other
            kind of model (text or image to video).
    """
    header, expert, model = read_header(path), base.part.expert, str(base.folder)
    check_kind(header, base.variant, text=f"--init-adapter {header.path}", model=model)
    log_unknown_kind(header, base.variant, model=model)
    adapter = load_adapter(header)
    check_adapter_fits(adapter, transformer)
    if adapter.expert and adapter.expert != expert:
        logger.warning(
            "--init-adapter %s was trained for the %s-noise expert, and this run trains %s",
            adapter.path, adapter.expert,
            f"the {expert}-noise expert" if expert else "a model with one transformer",
        )  # fmt: skip
    wanted = lora_metadata(shape, (name.partition(".lora_")[0] for name in masters.parameters))
    differing = [
        f"{key}: found {adapter.metadata[key]}, wanted {value}"
        for key, value in wanted.items()
        if not key.endswith("target_modules") and adapter.metadata.get(key, value) != value
    ]
    scale = scale_of(shape.alpha, shape.rank, rslora=shape.rslora)
    scales = {update.scale for update in adapter.updates().values()}
    if scales != {scale}:  # also if rsLoRA or a module's own alpha makes the difference
        differing.append(f"scale of B A: found {sorted(scales)}, wanted {scale}")
    try:
        if differing:
            raise CheckpointError("; ".join(differing))
        masters.load(adapter.tensors)
    except CheckpointError as error:
        raise AdapterError(
            f"init_adapter {adapter.path} is not of this run's shape: {error}. Set lora.rank, "
            "lora.alpha, lora.rslora and lora.targets as it was trained"
        ) from None


def check_base(model: TrainedModel, data: Data, max_loss: float) -> None:
    """Refuse a base that predicts no better than chance: its weights are wrong or incomplete.

    The loss is divided by the power of the target on fixed pairs. noise - latents has the power
    1 + mean(latents^2), so a model that predicts zero has a loss of 1.

    Args:
        model: The base, with an adapter that does not change it yet.
        data: The run's clips.
        max_loss: Limit of the loss as a share of the target's power.

    Raises:
        ModelError: The loss is not below the limit.
    """
    panel = make_panel("train", data.clips, data.source, num_clips=NUM_CLIPS, num_sigmas=NUM_SIGMAS)
    assert panel
    with attention.pinned(model.kernel.name, model.device):
        table = losses(
            panel, model.transformer, data.source, device=model.device, dtype=model.dtype
        )
    power = 1.0 + sum(
        float(data.source.latents(clip).square().mean()) for clip in panel.clips
    ) / len(panel.clips)
    share = table.mean() / power
    if not share < max_loss:
        raise ModelError(
            f"the base model predicts no better than chance: its loss on {NUM_CLIPS * NUM_SIGMAS} "
            f"fixed pairs of {describe_range(model.part.sigmas)} is {share:.2f} of the target's "
            f"power, expected under {max_loss}. Its weights are probably incomplete or of another "
            "model; to train it all the same: --set allow_untrained_base=true"
        )
