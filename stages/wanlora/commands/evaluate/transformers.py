"""Transformers of the model in memory: one at a time for losses, all of them for videos.

Owns: when each is loaded and released.
"""

import gc
from collections.abc import Sequence
from typing import Any

import torch

from wanlora.adapters.lora import check_adapter_fits
from wanlora.commands.evaluate.setup import Setup
from wanlora.commands.evaluate.subjects import Subject
from wanlora.cost.memory import weight_bytes
from wanlora.progress import waiting
from wanlora.wan.host_memory import HostBytes, require_host_memory
from wanlora.wan.placement import free_bytes, streamed_to_fit, working_bytes
from wanlora.wan.streaming import require_streaming, stream_blocks
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import Expert, TransformerPart


class Transformers:
    """Loaded transformers without adapters; each is loaded when it is needed.

    Args:
        setup: Values that are the same for all models.
        compared: The adapters. Each is checked against its transformer before hours of work.
    """

    def __init__(self, setup: Setup, compared: Sequence[Subject]) -> None:
        self._setup = setup
        self._compared = compared
        self._loaded: dict[Expert | None, Any] = {}
        self._num_streamed = num_streamed(setup)

    def only(self, part: TransformerPart) -> Any:
        """Return one transformer, and release the others first.

        Raises:
            ModelError: The weights cannot be loaded.
            AdapterError: An adapter does not fit.
        """
        for expert in self._loaded.keys() - {part.expert}:
            del self._loaded[expert]
            gc.collect()  # streamed blocks refer to themselves
            if self._setup.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._get(part, self._setup.device)

    def all(self) -> tuple[dict[Expert | None, Any], bool]:
        """Return every transformer of the model, and whether they take turns on the device.

        If a GPU cannot hold two, those that are not loaded yet stay in main memory, and `denoise`
        moves them. Raises as `only`.
        """
        missing = [
            part for part in self._setup.variant.transformers if part.expert not in self._loaded
        ]
        in_turn = self._setup.is_pair and not self._num_streamed and self._too_large(len(missing))
        home = torch.device("cpu") if in_turn else self._setup.device
        parts = self._setup.variant.transformers
        return {part.expert: self._get(part, home) for part in parts}, in_turn

    def _too_large(self, num_missing: int) -> bool:
        """Return True if the device lacks memory for more transformers beside those it holds."""
        device, dtype = self._setup.device, self._setup.dtype
        if device.type != "cuda":
            return False
        each = weight_bytes(self._setup.variant.shape, dtype.itemsize, self._setup.quantize)
        working = working_bytes(self._setup.variant, self._setup.bucket, dtype)
        if num_missing * each + working <= free_bytes(device):
            return False
        require_host_memory(
            HostBytes(int(2 * each)), "keeping both experts in main memory, to use one at a time",
            "--videos-per-activity 0",
        )  # fmt: skip
        return True

    def _get(self, part: TransformerPart, device: torch.device) -> Any:
        if part.expert not in self._loaded:
            folder = self._setup.folder
            with waiting(f"loading the transformer in {folder / part.subfolder}"):
                transformer = load_transformer(
                    folder, dtype=self._setup.dtype, device=device, subfolder=part.subfolder,
                    quantize=self._setup.quantize, num_streamed=self._num_streamed,
                )  # fmt: skip
                stream_blocks(transformer, self._num_streamed, device=device)
            for item in self._compared:  # of every expert: they have one shape
                check_adapter_fits(item.scaled.adapter, transformer)
            self._loaded[part.expert] = transformer
        return self._loaded[part.expert]


def num_streamed(setup: Setup) -> int:
    """Number of streamed blocks of each transformer.

    Raises:
        ConfigError: The model has fewer blocks.
        DeviceError: The host memory is too small.
    """
    shape, dtype, number = setup.variant.shape, setup.dtype, setup.stream_blocks
    quantize = setup.quantize
    if number == "auto":
        free = free_bytes(setup.device) - working_bytes(setup.variant, setup.bucket, dtype)
        fits = weight_bytes(shape, dtype.itemsize, quantize) <= free  # a pair takes turns
        number = (
            0 if fits else streamed_to_fit(shape, dtype, free, 1 + setup.is_pair, quantize=quantize)
        )
    require_streaming(shape, number, dtype, 1 + setup.is_pair, quantize=quantize)
    return number
