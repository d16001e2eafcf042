"""Contract 3: LoRA matrices in the transformer, and the file that stores them."""

import importlib
from typing import TYPE_CHECKING, Any

from wanlora.adapters.header import ADAPTER_FILE, PROVENANCE_PREFIX, AdapterHeader, read_header

if TYPE_CHECKING:
    from wanlora.adapters.file import (
        AdapterFile,
        LoraShape,
        lora_metadata,
        read_adapter,
        save_adapter,
    )
    from wanlora.adapters.lora import (
        adapter_parameters,
        add_adapter,
        check_adapter_fits,
        initial_value,
        initial_values,
    )
    from wanlora.adapters.updates import PREFIX, scale_of

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
