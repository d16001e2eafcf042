"""Adapters in a transformer for inference: their choice, their scales, and loading them.

Owns: adding and removing adapters with diffusers' own loader. Must not import a pipeline, the VAE
or the text encoder.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora.adapters.file import AdapterFile, read_adapter
from wanlora.adapters.header import split_scale
from wanlora.adapters.lora import check_adapter_fits
from wanlora.adapters.updates import PREFIX
from wanlora.wan.variants import Expert
from wanlora.wan.weights import file_sha256


@dataclass(frozen=True, slots=True)
class ScaledAdapter:
    """An adapter and its strength: 1 = as trained, 0 = the base model.

    Attributes:
        expert: Transformer that it is for, in a model with two.
    """

    adapter: AdapterFile
    scale: float
    sha256: str
    expert: Expert | None = None

    @property
    def record(self) -> dict[str, Any]:
        """Return the values that identify the adapter in the record of a video."""
        record = {"path": str(self.adapter.path), "sha256": self.sha256, "scale": self.scale}
        return record | ({"expert": self.expert} if self.expert else {})


def read_scaled(text: str) -> ScaledAdapter:
    """Read the adapter that `--adapter` names: PATH or PATH=SCALE; see `split_scale`.

    Raises:
        AdapterError: There is no adapter, or the scale is not a finite number.
    """
    return scaled(*split_scale(text))


def scaled(path: Path, scale: float, *, expert: Expert | None = None) -> ScaledAdapter:
    """Read the adapter at a path, to be used at a scale. Raises as `read_adapter`."""
    adapter = read_adapter(path)
    return ScaledAdapter(adapter, scale, file_sha256(adapter.path), expert)


def attach_by_expert(
    transformers: Mapping[Expert | None, Any], adapters: Sequence[ScaledAdapter]
) -> None:
    """Put each adapter into the transformer of its expert; one without adapters stays as it is.

    Args:
        transformers: Transformers by expert; the only one of a model has the key None.
        adapters: Adapters, each with its expert.

    Raises:
        AdapterError: An adapter was made for another model.
    """
    for expert, transformer in transformers.items():
        if own := [item for item in adapters if item.expert == expert]:
            attach(transformer, own)


def attach(transformer: Any, adapters: Sequence[ScaledAdapter]) -> None:
    """Put adapters into a transformer; their updates add up, each by its scale.

    Args:
        transformer: Transformer without adapters.
        adapters: Adapters; at least one.

    Raises:
        AdapterError: An adapter was made for another model.
    """
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, item in zip(names, adapters, strict=True):
        check_adapter_fits(item.adapter, transformer)
        with warnings.catch_warnings():  # peft warns of a second adapter
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            _put_in(transformer, item.adapter, name)
    transformer.set_adapters(names, [item.scale for item in adapters])


def _put_in(transformer: Any, adapter: AdapterFile, name: str) -> None:
    """Load an adapter with diffusers' loader, from the tensors that were read from its file."""
    transformer.load_lora_adapter(
        {f"{PREFIX}{key}": tensor for key, tensor in adapter.tensors.items()},
        metadata=dict(adapter.metadata),
        prefix=PREFIX.removesuffix("."),
        adapter_name=name,
    )


def detach(transformer: Any) -> None:
    """Remove all adapters; the transformer is then the base's, layer by layer."""
    transformer.unload_lora()
