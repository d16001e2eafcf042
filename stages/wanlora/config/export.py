"""What takes an adapter to other tools: `export`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from wanlora.config.settings import Flag, Settings


class ExportConfig(Settings):
    """An adapter as another tool's file, or multiplied out; read back before it counts."""

    adapter: Annotated[
        Path, Field(description="Run folder, PEFT folder or adapter file, in any format."), Flag()
    ]
    format: Annotated[
        Literal["diffusers", "peft", "comfyui", "kohya", "merged"],
        Field(description="What to write; merged = a whole model folder (docs/adapters.md)."),
        Flag(),
    ]
    output: Annotated[
        Path,
        Field(description="A .safetensors file; for peft and merged a folder."),
        Flag(),
    ]
    checkpoint: Annotated[
        str,
        Field(
            description="Which adapter of a run: latest, best, ema, or the steps of a checkpoint.",
            pattern=r"^(latest|best|ema|\d+)$",
        ),
        Flag(),
    ] = "latest"
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        Field(description="Type of the numbers; None = float32, and for merged the base's."),
        Flag(),
    ] = None
    model: Annotated[
        str | None,
        Field(
            description="Base to merge into: micro, a local diffusers folder or a hub id; "
            "None = the adapter's."
        ),
        Flag(),
    ] = None
    overwrite: Annotated[bool, Field(description="Replace an export that exists."), Flag()] = False

    @model_validator(mode="after")
    def _output_fits_the_format(self) -> Self:
        is_file = self.output.suffix == ".safetensors"
        if is_file == (self.format in ("peft", "merged")):
            expected = "a folder" if is_file else "a name ending in .safetensors"
            raise ValueError(f"--output {self.output}: --format {self.format} makes {expected}")
        if self.model and self.format != "merged":
            raise ValueError(f"--model goes with --format merged, not with {self.format}")
        return self
