"""Settings of `wanlora export`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from wanlora.config.settings import Settings, described, model_setting, setting
from wanlora.wan.variants import Expert

ExportFormat = Literal["diffusers", "peft", "comfyui", "kohya", "merged"]


class ExportConfig(Settings):
    """Export an adapter for another tool, or merge it into the base model; verify the result."""

    adapter: Annotated[
        tuple[Path, ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, Path) else value),
        described(
            "Run folder, PEFT folder or adapter file, in any format. For a model with two "
            "transformers, repeat it to export the adapters of both experts.",
            flag="Input and output",
            min_length=1,
            max_length=2,
        ),
    ]
    format: ExportFormat = setting(
        "diffusers", "Format; merged: a whole model folder (docs/adapters.md).", flag="Options"
    )
    output: Path | None = setting(
        None,
        "A .safetensors file; a folder for peft and merged. Required without --push. For an expert "
        "of a model with two transformers, _high_noise or _low_noise is added to the name.",
        flag="Input and output",
    )
    push: str | None = setting(
        None,
        "Upload the adapter of a run, its card and its newest previews to this Hugging Face model "
        "repository, USER/NAME, instead of writing files.",
        flag="Input and output",
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
    )
    private: bool = setting(
        False, "With --push: make a new repository private.", flag="Input and output"
    )
    checkpoint: str = setting(
        "latest",
        "Adapter of a run to export: latest, best, ema, or the step of a checkpoint.",
        flag="Input and output",
        pattern=r"^(latest|best|ema|\d+)$",
    )
    expert: Expert | None = setting(
        None,
        "For a model with two transformers: the one that an adapter of another tool is for, if "
        "neither its header nor its name shows it.",
        flag="Options",
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = setting(
        None,
        "Data type of the weights.",
        flag="Options",
        unset="float32; base model's if merged",
    )
    model: str | None = model_setting(
        unset="the base model of the adapter", use="Base model for --format merged"
    )
    overwrite: bool = setting(False, "Replace an existing export.", flag="Input and output")

    @model_validator(mode="after")
    def _output_fits_the_format(self) -> Self:
        if self.push:
            return self._push_alone()
        if self.output is None:
            raise ValueError("--output is required, or --push USER/NAME")
        if self.private:
            raise ValueError("--private needs --push")
        is_file = self.output.suffix == ".safetensors"
        if is_file == (self.format in ("peft", "merged")):
            expected = "a folder" if is_file else "a name ending in .safetensors"
            raise ValueError(f"--output {self.output}: --format {self.format} needs {expected}")
        if self.model and self.format != "merged":
            raise ValueError(f"--model needs --format merged, not {self.format}")
        return self

    def _push_alone(self) -> Self:
        if self.format != "diffusers":
            raise ValueError(f"--push uploads --format diffusers, not {self.format}")
        if len(self.adapter) > 1:
            raise ValueError("--push uploads one run: push each expert to a repository of its own")
        if unused := {"output", "model", "overwrite"} & self.model_fields_set:
            raise ValueError(f"--push writes no local files: leave out --{min(unused)}")
        return self
