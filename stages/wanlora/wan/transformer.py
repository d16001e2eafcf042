"""The model of stage two: only one transformer, frozen, with diffusers' dtypes.

Owns: loading the transformer. Must not import a pipeline, the VAE or the text encoder: training
needs only one sub-folder of the model.
"""

from collections import defaultdict
from pathlib import Path

import safetensors
import torch
from diffusers import WanTransformer3DModel

from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.cost.memory import Quantize
from wanlora.errors import ModelError
from wanlora.wan.quantized_loading import load_quantized
from wanlora.wan.weights import check_loading, hide_bars_without_terminal, read_json, weight_files


def load_transformer(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    subfolder: str = "transformer",
    quantize: Quantize = "none",
    num_streamed: int = 0,
) -> WanTransformer3DModel:
    """Load a transformer, frozen and in eval mode.

    It is cast while loading and never afterwards: `.to(bfloat16)` on a loaded model would also cast
    the modules that diffusers keeps in fp32 (rope, time embedder, scale_shift_table, affine norms).

    Args:
        folder: Model folder.
        dtype: Type of the base; bfloat16 on a GPU.
        device: Device to compute on.
        subfolder: Its sub-folder with the weights, see `variants.TransformerPart`.
        quantize: Format of the blocks' linear weights.
        num_streamed: Blocks that stay in host memory; `streaming.stream_blocks` comes next.

    Raises:
        ModelError: The folder is missing or its weights do not fit their configuration.
    """
    part = folder / subfolder
    hide_bars_without_terminal()
    if quantize != "none" or num_streamed:
        return load_quantized(part, quantize, dtype=dtype, device=device, num_streamed=num_streamed)
    # Straight to a GPU: the 14B would take 28 GB of the host's memory, for each process of a node.
    straight = {"device_map": {"": device}} if device.type == "cuda" else {}
    try:
        transformer, info = WanTransformer3DModel.from_pretrained(
            part, dtype=dtype, output_loading_info=True, local_files_only=True, **straight
        )
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, NotImplementedError):  # a weight without data cannot go to a GPU
            check_names(part)
        raise ModelError(f"cannot load the transformer in {part}: {error}") from error
    check_loading(info, part)
    return transformer.to(device).eval().requires_grad_(requires_grad=False)


def check_names(part: Path) -> None:
    """Refuse files that lack a weight of the model.

    Args:
        part: A `transformer/` folder.

    Raises:
        ModelError: Names the first missing weights.
    """
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(read_json(part / "config.json"))
    found: set[str] = set()
    for file in weight_files(part):
        with safetensors.safe_open(file, framework="pt") as opened:
            found.update(opened.keys())
    missing = sorted(model.state_dict().keys() - found)
    check_loading(defaultdict(list, missing_keys=missing), part)
