"""The probe: real steps of the largest bucket on a device of this machine.

Owns: what is loaded for it. Imported only if a probe is requested. Must not know: settings.
"""

import torch

from wanlora.adapters.file import LoraShape
from wanlora.adapters.lora import add_adapter
from wanlora.commands.estimate.card import Card
from wanlora.commands.estimate.case import Case
from wanlora.cost.flops import Activations
from wanlora.cost.gpus import gpu_of
from wanlora.cost.memory import uploaded_bytes
from wanlora.errors import ConfigError
from wanlora.progress import waiting
from wanlora.training import fitting
from wanlora.training.kernel_check import AttentionShape
from wanlora.training.kernel_probe import kernel_for
from wanlora.training.workload import Trial
from wanlora.wan import device as devices
from wanlora.wan.model_folder import resolve
from wanlora.wan.transformer import load_transformer

_PROBE_PASSES = 3
_PROBE_LACKS = 4 + 4 + 8
"""Bytes per trained parameter that a run takes and a probe does not: master, gradient and two
moments in fp32."""


def card_here(device: str, model: str) -> Card:
    """Device to probe, with the memory that is free on it.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        model: The model to load.

    Raises:
        DeviceError: It does not work.
    """
    place = devices.select_device(device, model)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    size = devices.base_dtype("auto", place).itemsize
    return Card(name, gpu_of(name), str(place), fitting.budget(place), element_bytes=size)


def probe(
    case: Case, model: str | None, shape: LoraShape, *, activations: Activations, kernel: str
) -> Trial:
    """Load the transformer with a fresh adapter, and take real steps of the largest bucket.

    Args:
        case: Clips, model, card and batch sizes.
        model: The model to load.
        shape: Rank, alpha and targets of the adapter.
        activations: Activation mode of all blocks; auto = the fastest modes that fit.
        kernel: Setting of the attention kernel.

    Raises:
        ConfigError: There is no model.
        DeviceError: Nothing fits into the memory of the device, or no attention kernel works.
    """
    device = torch.device(case.card.device)
    if not model:
        raise ConfigError("--probe runs a model: pass --model, or a --cache that names one")
    dtype = devices.base_dtype("auto", device)
    subfolder = case.variant.part(case.expert).subfolder
    folder = resolve(model, (subfolder,))
    with waiting(f"loading the transformer in {folder / subfolder}"):
        transformer = load_transformer(
            folder, dtype=dtype, device=device, subfolder=subfolder, quantize=case.work.quantize
        )
    parameters = add_adapter(transformer, shape, seed=0)
    choice = kernel_for(
        kernel,
        AttentionShape(
            num_tokens=case.work.num_tokens, other_tokens=frozenset(),
            batch_size=case.work.batch_size, num_heads=case.variant.shape.num_attention_heads,
            head_dim=case.variant.shape.attention_head_dim,
            num_text_tokens=case.variant.shape.num_text_tokens, dtype=dtype, device=device,
            num_image_tokens=case.variant.shape.num_image_tokens,
        ),
    )  # fmt: skip
    trained = sum(parameter.numel() for parameter in parameters.values())
    return fitting.fit(
        transformer, case.work, case.largest, case.variant, activations=activations,
        kernel=choice.name, device=device, dtype=dtype, passes=_PROBE_PASSES,
        reserved_bytes=int(_PROBE_LACKS * trained + uploaded_bytes(case.work)),
    )  # fmt: skip
