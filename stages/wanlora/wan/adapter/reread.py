"""Exports read back by the libraries that will read them: diffusers' converter and loader, peft's.

Owns: what a loader would compute with, module by module, from the file alone; none of our own
reading code takes part. Imports a pipeline, so training must never import this.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights

from wanlora.errors import AdapterError
from wanlora.wan.adapter.file import some
from wanlora.wan.adapter.names import LAYOUTS
from wanlora.wan.adapter.updates import Update, relative_error

READERS = {
    "diffusers": "diffusers", "peft": "peft", "comfyui": "diffusers", "kohya": "diffusers",
    "merged": "diffusers",
}  # fmt: skip
"""Which library reads an export back."""

_NAME = "default"


class _Skeleton(torch.nn.Module, PeftAdapterMixin):  # type: ignore[misc]
    """The adapted linear modules by their names and without weights: enough for a loader."""

    def __init__(self, updates: Mapping[str, Update]) -> None:
        super().__init__()
        for name, update in updates.items():
            *parents, leaf = name.split(".")
            module: torch.nn.Module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, torch.nn.Module())
                module = module.get_submodule(parent)
            rows, columns = update.b.shape[0], update.a.shape[1]
            linear = torch.nn.Linear(columns, rows, bias=False, device="meta")
            one_number = torch.zeros(()).expand(rows, columns)
            linear.weight = torch.nn.Parameter(one_number, requires_grad=False)
            module.add_module(leaf, linear)


def check_export(folder: Path, file: str, form: str, expected: Mapping[str, Update]) -> float:
    """Read an export back and compare every module's update with the original's.

    Args:
        folder: Where it is.
        file: Name of its `.safetensors`.
        form: Its format.
        expected: The original's updates.

    Returns:
        The largest relative error of an update, Frobenius norm; 0 = the same numbers.

    Raises:
        AdapterError: The reader refuses it; a module is missing, left over, or differs by more than
            rounding.
    """
    reader = READERS[form]
    skeleton: Any = _Skeleton(expected)
    try:
        if reader == "peft":
            keys = load_peft_weights(str(folder), device="cpu").keys()
            PeftModel.from_pretrained(skeleton, str(folder), adapter_name=_NAME)
        else:
            state, metadata = WanPipeline.lora_state_dict(
                str(folder), weight_name=file, local_files_only=True, return_lora_metadata=True
            )
            keys = state.keys()
            skeleton.load_lora_adapter(state, metadata=metadata, adapter_name=_NAME)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise AdapterError(f"{reader} does not read the {form} export: {error!r}") from error
    prefix = LAYOUTS[reader].prefix
    written = {key.removeprefix(prefix).partition(".lora_")[0] for key in keys}
    found = _loaded(skeleton)
    if not written == found.keys() == expected.keys():
        strange = sorted((written ^ expected.keys()) | (found.keys() ^ expected.keys()))
        raise AdapterError(
            f"{reader} does not read the modules from the {form} export that were written: it "
            f"differs in {some(strange)}"
        )
    return max(relative_error(found[module], expected[module]) for module in expected)


def _loaded(skeleton: torch.nn.Module) -> dict[str, Update]:
    """Take from each adapted layer what its forward pass would use."""
    found = {}
    for name, layer in skeleton.named_modules():
        if isinstance(layer, LoraLayer):
            magnitude: Any = layer.lora_magnitude_vector
            found[name] = Update(
                layer.lora_A[_NAME].weight.detach(),
                layer.lora_B[_NAME].weight.detach(),
                layer.scaling[_NAME],
                magnitude[_NAME].weight.detach() if _NAME in magnitude else None,
            )
    return found
