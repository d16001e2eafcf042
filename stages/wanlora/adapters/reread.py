"""Read exports back with the libraries of their users: WanPipeline's LoRA loader, and peft.

Owns: the model that an export is loaded into, and the matrices that a loader would use, module by
module, from the file alone, without wanlora's own reading code. Imports a pipeline, so
training must never import this.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights

from wanlora.adapters.file import AdapterFile
from wanlora.adapters.lora import check_adapter_fits
from wanlora.adapters.names import IMAGE_LINEARS, LAYOUTS, template
from wanlora.adapters.updates import Update, relative_error
from wanlora.core import units
from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.errors import AdapterError
from wanlora.wan.variants import VARIANTS, Variant

READERS = {
    "diffusers": "diffusers", "peft": "peft", "comfyui": "diffusers", "kohya": "diffusers",
    "merged": "diffusers",
}  # fmt: skip
"""Library that reads an export back."""

_NAME = "default"


def model_for(adapter: AdapterFile) -> WanTransformer3DModel:
    """Build the model an adapter is for, without its weights: enough for a loader.

    Its modules are those of a row of the table of variants, never the adapter's: a loader must
    refuse a name that the model does not have.

    Raises:
        AdapterError: The adapter fits no known variant.
    """
    recorded = adapter.provenance.get("variant")
    rows = sorted(VARIANTS.values(), key=lambda row: row.name != recorded)
    shapes = {row.shape: row for row in reversed(rows)}  # one row of each shape
    widths = _widths(adapter)
    for row in (row for row in rows if shapes[row.shape] is row):
        if widths - {row.shape.width}:
            continue  # before a second is spent on building it
        model = _without_weights(row)
        try:
            check_adapter_fits(adapter, model)
        except AdapterError:  # the next variant may fit; if none does, an error is raised below
            continue
        return model
    name, tensor = next(iter(adapter.tensors.items()))
    known = ", ".join(f"{row.name} {row.shape.width}" for row in VARIANTS.values())
    raise AdapterError(
        f"{adapter.path} fits no known variant of Wan (their widths: {known}): found {name} of "
        f"shape {tuple(tensor.shape)}, and {len(adapter.tensors) - 1} tensors more"
    )


def _widths(adapter: AdapterFile) -> set[int]:
    """Widths of the model that the adapter's attention layers show; empty without any."""
    return {
        int(tensor.shape[1])
        for name, tensor in adapter.tensors.items()
        if ".attn" in name and name.endswith(".lora_A.weight")
    }


def _without_weights(row: Variant) -> WanTransformer3DModel:
    """Build a variant whose linear weights are one shared zero each, and the rest has no data."""
    shape = row.shape
    config = {
        "num_layers": shape.num_layers, "num_attention_heads": shape.num_attention_heads,
        "attention_head_dim": shape.attention_head_dim, "ffn_dim": shape.ffn_dim,
        "text_dim": shape.text_dim, "in_channels": shape.in_channels,
        "out_channels": shape.out_channels, "image_dim": shape.image_dim,
        "added_kv_proj_dim": shape.width if shape.image_dim else None,
    }  # fmt: skip
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            zero = torch.zeros(()).expand(module.out_features, module.in_features)
            module.weight = torch.nn.Parameter(zero, requires_grad=False)
    return model


def check_export(
    folder: Path, file: str, form: str, adapter: AdapterFile, expected: Mapping[str, Update]
) -> float:
    """Load an export into the model it is for, and compare every module's update.

    Args:
        folder: The export's folder.
        file: Name of its `.safetensors`.
        form: Its format.
        adapter: The original.
        expected: The original's updates.

    Returns:
        The largest relative error of an update, Frobenius norm; 0 = the same numbers.

    Raises:
        AdapterError: The adapter fits no variant; the reader refuses the export; or a module is
            missing or left over.
    """
    reader = READERS[form]
    model = model_for(adapter)
    try:
        if reader == "peft":
            keys = _load_with_peft(folder, model)
        else:
            keys = _load_with_diffusers(folder, file, model, adapter)
    except Exception as error:  # a loader may raise anything
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error!s:.300}"
        raise AdapterError(f"{reader} does not read the {form} export: {reason}") from error
    prefix = LAYOUTS[reader].prefix
    written = {key.removeprefix(prefix).partition(".lora_")[0] for key in keys}
    found = _without_added(_loaded(model), expected)
    if not written == found.keys() == expected.keys():
        strange = sorted((written ^ expected.keys()) | (found.keys() ^ expected.keys()))
        raise AdapterError(
            f"{reader} does not read the modules from the {form} export that were written: it "
            f"differs in {units.names(strange)}"
        )
    return max(relative_error(found[module], expected[module]) for module in expected)


def _load_with_peft(folder: Path, model: Any) -> Iterable[str]:
    """Load an export into a model, and return its keys."""
    PeftModel.from_pretrained(model, str(folder), adapter_name=_NAME)
    keys: Mapping[str, Any] = load_peft_weights(str(folder), device="cpu")
    return keys


def _load_with_diffusers(
    folder: Path, file: str, model: WanTransformer3DModel, adapter: AdapterFile
) -> Iterable[str]:
    """Load an export into a model as a user does, and return its keys.

    The adapter of a low-noise expert is loaded into the second of two transformers.
    """
    place = {"weight_name": file, "local_files_only": True}
    keys: Mapping[str, Any] = WanPipeline.lora_state_dict(str(folder), **place)
    if adapter.expert == "low":
        first = _without_weights(VARIANTS["micro"])  # only its configuration is read
        parts = {"transformer": first, "transformer_2": model}
        place["load_into_transformer_2"] = True
    else:
        parts = {"transformer": model}
    pipeline = WanPipeline(None, None, vae=None, scheduler=None, **parts)
    with warnings.catch_warnings():  # peft warns of the modules in `_without_added`
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters")
        pipeline.load_lora_weights(str(folder), adapter_name=_NAME, **place)
    return keys


def _without_added(
    found: Mapping[str, Update], expected: Mapping[str, Update]
) -> dict[str, Update]:
    """Drop the zeros that diffusers adds for modules that read an image, if a file has none.

    It makes them on the device of the model, which is meta here.
    """

    def is_added(module: str, b: torch.Tensor) -> bool:
        return template(module)[0] in IMAGE_LINEARS and (b.is_meta or not b.any())

    return {
        module: update
        for module, update in found.items()
        if module in expected or not is_added(module, update.b)
    }


def _loaded(model: torch.nn.Module) -> dict[str, Update]:
    """Take from each adapted layer what its forward pass would use."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            magnitude: Any = layer.lora_magnitude_vector
            found[name] = Update(
                layer.lora_A[_NAME].weight.detach(),
                layer.lora_B[_NAME].weight.detach(),
                layer.scaling[_NAME],
                magnitude[_NAME].weight.detach() if _NAME in magnitude else None,
            )
    return found
