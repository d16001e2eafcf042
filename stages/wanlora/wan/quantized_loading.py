"""Load a transformer with 8-bit weights or with streamed blocks, one tensor after the other.

Owns: reading, rounding and placing each tensor alone, so that neither the host nor the GPU ever
holds the whole model in 16 bits. diffusers' loader holds it whole before anything can be quantized
or moved.
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
from wanlora.cost.memory import Quantize, streamed_blocks
from wanlora.errors import ModelError
from wanlora.wan.quantize import QuantizedLinear, is_quantized, put
from wanlora.wan.weights import check_loading, read_json, weight_files


def load_quantized(
    part: Path, kind: Quantize, *, dtype: torch.dtype, device: torch.device, num_streamed: int = 0
) -> WanTransformer3DModel:
    """Load a transformer as `load_transformer` does, with quantized or streamed blocks.

    The values are those of `quantize_blocks` on the loaded transformer, bit for bit.

    Args:
        part: Folder of the transformer.
        kind: Format of the blocks' linear weights.
        dtype: Type of all other weights that diffusers does not keep in fp32, and of the products.
        device: Device to load to; it also rounds the weights.
        num_streamed: Blocks that stay in host memory, for `streaming.stream_blocks`.

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
        streamed = streamed_blocks(len(model.blocks), num_streamed)
        waiting = tuple(f"blocks.{index}." for index in streamed)
        for name, tensor in _tensors(part, device, waiting if kind == "none" else ()):
            missing.discard(name)
            if name not in expected:
                info["unexpected_keys"].append(name)
            elif tensor.shape != expected[name]:
                info["mismatched_keys"].append(name)
            else:
                home = torch.device("cpu") if name.startswith(waiting) else device
                _set(model, name, tensor, _type_of(name, dtype), kind, home)
        info["missing_keys"] = list(missing)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"cannot load the transformer in {part}: {error}") from error
    check_loading(info, part)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model.eval().requires_grad_(requires_grad=False)


def _tensors(
    part: Path, device: torch.device, waiting: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Read each tensor of the files straight to the device; those of some blocks to the host."""
    for file in weight_files(part):
        with (
            safetensors.safe_open(file, framework="pt", device=str(device)) as here,
            safetensors.safe_open(file, framework="pt") as on_host,
        ):
            for name in here.keys():  # noqa: SIM118  (not a mapping)
                yield name, (on_host if name.startswith(waiting) else here).get_tensor(name)


def _type_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Type of a tensor: fp32 for those that diffusers keeps in fp32."""
    kept = WanTransformer3DModel._keep_in_fp32_modules  # noqa: SLF001  (its loader's own list)
    return torch.float32 if set(name.split(".")) & set(kept) else dtype


def _set(
    model: nn.Module,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    kind: Quantize,
    home: torch.device,
) -> None:
    """Put a tensor into the model; a weight that is quantized brings its layer with it."""
    module_name, _, own = name.rpartition(".")
    module = model.get_submodule(module_name)
    if kind != "none" and own == "weight" and is_quantized(module, module_name):
        layer = QuantizedLinear(tensor.to(dtype), None, kind).to(home)
        layer.bias = module.bias
        put(model, module_name, layer)
    else:  # a copy: a tensor of a file keeps the whole file mapped
        value = tensor.to(home, dtype, copy=True)
        setattr(module, own, nn.Parameter(value, requires_grad=False))
