"""What takes an adapter to other tools: `export`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from wanlora.config.settings import Flag, Settings


class ExportConfig(Settings):
    """An adapter as another tool's file, or multiplied out; read back before it counts."""

    adapter: Annotated[
        Path,
        Field(description="Run folder, PEFT folder or adapter file, in any format."),
        Flag(heading="Input and output"),
    ]
    format: Annotated[
        Literal["diffusers", "peft", "comfyui", "kohya", "merged"],
        Field(description="What to write; merged = a whole model folder (docs/adapters.md)."),
        Flag(),
    ] = "diffusers"
    output: Annotated[
        Path | None,
        Field(
            description="A .safetensors file; for peft and merged a folder. Required without "
            "--push."
        ),
        Flag(heading="Input and output"),
    ] = None
    push: Annotated[
        str | None,
        Field(
            description="Instead of writing files here: upload a run's adapter, its card and its "
            "newest previews to this model repository, USER/NAME.",
            pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        ),
        Flag(heading="Input and output"),
    ] = None
    private: Annotated[
        bool,
        Field(description="With --push: a repository that is created is private."),
        Flag(heading="Input and output"),
    ] = False
    checkpoint: Annotated[
        str,
        Field(
            description="Which adapter of a run: latest, best, ema, or the steps of a checkpoint.",
            pattern=r"^(latest|best|ema|\d+)$",
        ),
        Flag(heading="Input and output"),
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
        Flag(heading="Model and machine"),
    ] = None
    overwrite: Annotated[
        bool, Field(description="Replace an export that exists."), Flag(heading="Input and output")
    ] = False

    @model_validator(mode="after")
    def _output_fits_the_format(self) -> Self:
        if self.push:
            return self._push_alone()
        if self.output is None:
            raise ValueError("--output is required, or --push USER/NAME")
        if self.private:
            raise ValueError("--private goes with --push")
        is_file = self.output.suffix == ".safetensors"
        if is_file == (self.format in ("peft", "merged")):
            expected = "a folder" if is_file else "a name ending in .safetensors"
            raise ValueError(f"--output {self.output}: --format {self.format} makes {expected}")
        if self.model and self.format != "merged":
            raise ValueError(f"--model goes with --format merged, not with {self.format}")
        return self

    def _push_alone(self) -> Self:
        if self.format != "diffusers":
            raise ValueError(f"--push uploads --format diffusers, not {self.format}")
        if unused := {"output", "model", "overwrite"} & self.model_fields_set:
            raise ValueError(f"--push writes no files here: leave out --{min(unused)}")
        return self
