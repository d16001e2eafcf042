"""What comes of an adapter: `sample`; and `demo`, which does it all."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from wanlora.config.settings import (
    Device,
    Flag,
    Seed,
    Settings,
)


class SampleConfig(Settings):
    """Base model, or base and adapter, and prompts to mp4."""

    adapter: Annotated[
        Path | None,
        Field(description="Run folder or adapter file; without it the base model is sampled."),
        Flag(),
    ] = None
    prompt: Annotated[
        tuple[str, ...], Field(description="What to show; repeat for several."), Flag()
    ] = ()
    latents: Annotated[
        Path | None,
        Field(
            description="Instead of prompts: decode the previews of a run, of one step, or one "
            "file of latents with the VAE."
        ),
        Flag(),
    ] = None
    model: Annotated[
        str | None,
        Field(description="micro, a local diffusers folder or a hub id; None = the adapter's."),
        Flag(),
    ] = None
    num_videos: Annotated[
        int, Field(description="Videos for each prompt, with seeds seed, seed+1, ...", ge=1),
        Flag(),
    ] = 1  # fmt: skip
    output_dir: Annotated[Path, Field(description="Folder for the videos."), Flag()] = Path(
        "outputs/samples"
    )
    output: Annotated[
        Path | None, Field(description="Name of the one video; instead of output_dir."), Flag()
    ] = None
    overwrite: Annotated[bool, Field(description="Replace videos that exist."), Flag()] = False
    seed: Seed = 0
    scale: Annotated[float, Field(description="Strength of the adapter."), Flag()] = 1.0
    num_frames: Annotated[
        int | None, Field(description="Frames, 4k+1; None = the variant's.", ge=1), Flag()
    ] = None
    height: Annotated[int | None, Field(description="px; None = the variant's."), Flag()] = None
    width: Annotated[int | None, Field(description="px; None = the variant's."), Flag()] = None
    steps: Annotated[
        int | None, Field(description="Denoising steps; None = the variant's.", ge=1), Flag()
    ] = None
    guidance_scale: Annotated[
        float | None, Field(description="Classifier-free guidance; None = the variant's.", ge=0),
        Flag(),
    ] = None  # fmt: skip
    negative_prompt: Annotated[
        str | None, Field(description="What to avoid; None = the variant's."), Flag()
    ] = None
    fps: Annotated[float, Field(description="Frames a second of the mp4.", gt=0)] = 16.0
    device: Device = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Field(description="Type of the transformer; auto = bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto"

    @model_validator(mode="after")
    def _prompts_or_latents(self) -> Self:
        if self.latents is None and not self.prompt:
            raise ValueError("nothing to sample: pass --prompt, or --latents of a run's previews")
        used = {"latents", "model", "output_dir", "overwrite", "fps", "device"}
        if self.latents is not None and (unused := sorted(self.model_fields_set - used)):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise ValueError(f"latents are already denoised, so leave out {names}")
        return self


class DemoConfig(Settings):
    """The whole pipeline on the embedded micro model and drawn videos, minutes on a CPU."""

    output_dir: Annotated[
        Path, Field(description="Folder for everything the demo makes."), Flag()
    ] = Path("outputs/demo")
    concept: Annotated[
        Literal["clapping", "striped", "triangle"],
        Field(description="What to teach: none of them has the base ever seen."),
        Flag(),
    ] = "clapping"
    max_steps: Annotated[int, Field(description="Training steps.", ge=1), Flag()] = 120
    known_videos: Annotated[
        int,
        Field(
            description="Videos of what the base knows, mixed in so that it is not forgotten.",
            ge=0,
        ),
        Flag(),
    ] = 24
    seed: Seed = 0
