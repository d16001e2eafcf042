"""Result of an export: the new files, and the loader that each of them is for.

Owns: the lines for people. Must not import torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wanlora.adapters.trained_on import Kind
from wanlora.core import units
from wanlora.wan.variants import Expert


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Result of the export of one adapter.

    Attributes:
        output: The new file or folder; after a push the address of the repository.
        format: Its format.
        adapter: The exported adapter.
        expert: Transformer that it is for, in a model with two; None for a model with one.
        source_format: Format of the exported adapter.
        model: The base model that the adapter was merged into; None for an adapter.
        dtype: Type of the numbers; None = the base's.
        modules: Number of adapted modules.
        bytes: Size of the new weights on disk.
        max_relative_error: Maximum relative error of a module's update after it is read back.
        read_by: The library that read it back.
        kind: Kind of the model, T2V or I2V; None if the adapter does not show it.
    """

    output: str
    format: str
    adapter: str
    expert: Expert | None
    source_format: str
    model: str | None
    dtype: str | None
    modules: int
    bytes: int
    max_relative_error: float
    read_by: str
    kind: Kind | None

    @property
    def exit_code(self) -> int:
        """Always 0: an export that fails its check is an error, and writes nothing."""
        return 0

    def lines(self) -> list[str]:
        """Format the path, the size and the error of the export, and the loader it is for."""
        return [*self.made(), *next_steps([self])]

    def made(self) -> list[str]:
        """Format the path, the size and the error of the export."""
        into = f" merged into {self.model}" if self.model else f" for {self.format}"
        expert = f", {self.expert}-noise expert" if self.expert else ""
        error = self.max_relative_error
        exact = "every update is the same" if error == 0 else f"updates differ by up to {error:.2g}"
        return [
            f"{self.output}: {self.adapter}{into}{expert}, {self.modules} modules, "
            f"{self.dtype or 'types of the base'}, {units.size(self.bytes)}",
            f"read back by {self.read_by}: {exact}",
        ]


@dataclass(frozen=True, slots=True)
class ExportPair:
    """Result of the export of two adapters, one for each transformer of a model.

    Attributes:
        exports: That of the high-noise expert, then that of the low-noise expert.
    """

    exports: list[ExportResult]

    @property
    def exit_code(self) -> int:
        """Always 0; see `ExportResult`."""
        return 0

    def lines(self) -> list[str]:
        """Lines of both, and the loader that each is for."""
        made = [line for export in self.exports for line in export.made()]
        return [*made, *next_steps(self.exports)]


def next_steps(exports: list[ExportResult]) -> list[str]:
    """Name the loader of each export of a model with two transformers; nothing for other models."""
    if exports[0].expert is None or "://" in exports[0].output:  # a repository has its own card
        return []
    if exports[0].format == "merged":
        return _merged_steps(exports)
    return [f"next: {_LOADERS[export.format](Path(export.output), export)}" for export in exports]


def _merged_steps(exports: list[ExportResult]) -> list[str]:
    pipeline = "WanImageToVideoPipeline" if exports[0].kind == "I2V" else "WanPipeline"
    merged = {export.expert for export in exports}
    kept = [expert for expert in ("high", "low") if expert not in merged]
    unchanged = [f"the {expert}-noise expert is the base's, without an adapter" for expert in kept]
    return [*unchanged, f'next: {pipeline}.from_pretrained("{exports[0].output}")']


def _comfyui_step(file: Path, export: ExportResult) -> str:
    kind = export.kind.lower() if export.kind else "*"
    return (
        f"in ComfyUI, load {file.name} with the LoraLoaderModelOnly behind the loader of the "
        f"{export.expert}-noise model (wan2.2_{kind}_{export.expert}_noise_14B...)"
    )


def _diffusers_step(file: Path, export: ExportResult) -> str:
    into = ", load_into_transformer_2=True" if export.expert == "low" else ""
    return (
        f'pipeline.load_lora_weights("{file.parent}", weight_name="{file.name}", '
        f'adapter_name="{export.expert}"{into})'
    )


def _peft_step(folder: Path, export: ExportResult) -> str:
    part = "transformer_2" if export.expert == "low" else "transformer"
    return f'PeftModel.from_pretrained(pipeline.{part}, "{folder}")'


_LOADERS: dict[str, Callable[[Path, ExportResult], str]] = {
    "diffusers": _diffusers_step,
    "peft": _peft_step,
    "comfyui": _comfyui_step,
    "kohya": _comfyui_step,
}
