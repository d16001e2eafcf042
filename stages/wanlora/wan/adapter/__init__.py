"""The adapter: LoRA matrices in the transformer, and contract 3, the file they are kept in.

lora.py      in the model: which modules, how the matrices start, whether a file fits
header.py    a file without its tensors: keys and provenance, for checks that need no torch
file.py      in a file: read_adapter takes any trainer's plain LoRA, save_adapter writes ours
names.py     both names of every module, whatever the prefix; the four layouts that export writes
alphas.py    where a file keeps alpha and rank, and in which order they count
updates.py   scale B A of each module: scales, norms, differences
formats.py   an adapter as the bytes of another tool's file
merge.py     an adapter multiplied out into the transformer's weights
reread.py    exports read back by diffusers and peft; imports a pipeline, so training never does
"""

import importlib
from typing import TYPE_CHECKING, Any

from wanlora.wan.adapter.header import ADAPTER_FILE, PROVENANCE_PREFIX, AdapterHeader, read_header

if TYPE_CHECKING:
    from wanlora.wan.adapter.file import (
        AdapterFile,
        LoraShape,
        lora_metadata,
        read_adapter,
        save_adapter,
    )
    from wanlora.wan.adapter.lora import (
        adapter_parameters,
        add_adapter,
        check_adapter_fits,
        initial_value,
        initial_values,
    )
    from wanlora.wan.adapter.updates import PREFIX, scale_of

__all__ = [
    "ADAPTER_FILE",
    "PREFIX",
    "PROVENANCE_PREFIX",
    "AdapterFile",
    "AdapterHeader",
    "LoraShape",
    "adapter_parameters",
    "add_adapter",
    "check_adapter_fits",
    "initial_value",
    "initial_values",
    "lora_metadata",
    "read_adapter",
    "read_header",
    "save_adapter",
    "scale_of",
]

_MODULES = {
    "file": ("AdapterFile", "LoraShape", "lora_metadata", "read_adapter", "save_adapter"),
    "lora": (
        "adapter_parameters", "add_adapter", "check_adapter_fits", "initial_value",
        "initial_values",
    ),
    "updates": ("PREFIX", "scale_of"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a module when it is used: a header needs no torch, and a file needs no diffusers."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
