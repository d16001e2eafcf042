"""Load a transformer whose blocks have 8-bit weights, one tensor after the other.

Owns: reading and rounding each tensor alone, so that neither the host nor the GPU ever holds the
model in 16 bits. diffusers' loader holds it whole before anything can be quantized.
"""

from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.cost.memory import Quantize
from wanlora.errors import ModelError
from wanlora.wan.quantize import QuantizedLinear, is_quantized, put
from wanlora.wan.weights import check_loading, read_json, weight_files


def load_quantized(
    part: Path, kind: Quantize, *, dtype: torch.dtype, device: torch.device
) -> WanTransformer3DModel:
    """Load a transformer as `load_transformer` does, with quantized blocks.

    The values are those of `quantize_blocks` on the loaded transformer, bit for bit.

    Args:
        part: Folder of the transformer.
        kind: Format of the blocks' linear weights.
        dtype: Type of all other weights that diffusers does not keep in fp32, and of the products.
        device: Device to load to.

    Raises:
        ModelError: The folder is missing or its weights do not fit their configuration.
    """
    try:
        with no_init_weights(), init_empty_weights():  # buffers keep their values
            model = WanTransformer3DModel.from_config(read_json(part / "config.json"))
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        info: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": []}
        info |= {"mismatched_keys": [], "error_msgs": []}
        missing = set(expected)
        for name, tensor in _tensors(part, device):
            missing.discard(name)
            if name not in expected:
                info["unexpected_keys"].append(name)
            elif tensor.shape != expected[name]:
                info["mismatched_keys"].append(name)
            else:
                _set(model, name, tensor, _type_of(name, dtype), kind)
        info["missing_keys"] = list(missing)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"cannot load the transformer in {part}: {error}") from error
    check_loading(info, part)
    return model.to(device).eval().requires_grad_(requires_grad=False)


def _tensors(part: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Read each tensor of the files straight to the device."""
    for file in weight_files(part):
        with safetensors.safe_open(file, framework="pt", device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                yield name, opened.get_tensor(name)


def _type_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Type of a tensor: fp32 for those that diffusers keeps in fp32."""
    kept = WanTransformer3DModel._keep_in_fp32_modules  # noqa: SLF001  (its loader's own list)
    return torch.float32 if set(name.split(".")) & set(kept) else dtype


def _set(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, kind: Quantize) -> None:
    """Put a tensor into the model; a weight that is quantized brings its layer with it."""
    module_name, _, own = name.rpartition(".")
    module = model.get_submodule(module_name)
    if own == "weight" and is_quantized(module, module_name):
        put(model, module_name, QuantizedLinear(tensor.to(dtype), module.bias, kind))
    else:  # a copy: a tensor of a file keeps the whole file mapped
        setattr(module, own, nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False))
