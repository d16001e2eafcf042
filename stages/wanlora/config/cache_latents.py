"""Settings of `wanlora cache-latents` and of the store."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from wanlora.config.settings import (
    DEFAULT_MODEL,
    CacheDir,
    Device,
    Settings,
    SourceRoot,
    ViewName,
    setting,
)


class StoreSettings(Settings):
    """Format of stored tensors."""

    dtype: Literal["float16", "float32"] = setting(
        "float16", "Data type of stored latents and embeddings."
    )
    clips_per_segment: int = setting(
        32, "Maximum number of clips per segment (an object of the store).", ge=1, le=512
    )
    segment_bytes: int = setting(128 * 2**20, "Maximum uncompressed bytes per segment.", ge=1)
    segment_s: float = setting(
        120.0, "Maximum seconds of work per segment: what an interruption can cost.", gt=0
    )
    latent_mantissa_bits: int | None = setting(
        None,
        "Round latents to this many mantissa bits before storing them; 7 is the precision of "
        "bfloat16 and saves a fifth of the disk space.",
        ge=1,
        le=22,
        unset="no rounding",
    )

    @model_validator(mode="after")
    def _bits_fit_the_type(self) -> Self:
        if self.dtype == "float16" and (self.latent_mantissa_bits or 0) > 10:
            raise ValueError(
                f"latent_mantissa_bits {self.latent_mantissa_bits}: float16 has 10 bits"
            )
        return self


class CacheLatentsConfig(Settings):
    """Stage one: encode each clip with the VAE and each caption with the text encoder, once."""

    manifest: tuple[Path, ...] = setting(
        (Path("data/processed"),),
        "Manifest, or folder with train.jsonl and val.jsonl; repeat for several.",
        flag="Input and output",
    )
    source_root: SourceRoot = ()
    cache: CacheDir = Path("cache")
    model: str = setting(
        DEFAULT_MODEL,
        "Model: micro (embedded), a local diffusers folder, or a Hugging Face model id.",
        flag="Model and machine",
    )
    device: Device = "auto"
    launcher: Literal["local", "ray"] = setting(
        "local",
        "Start workers as processes on this machine (local; with torchrun or srun, each rank is a "
        "worker), or as actors of a Ray cluster (ray; pip install 'wanlora[ray]').",
        flag="Model and machine",
    )
    num_workers: int | None = setting(
        None,
        "Number of processes or actors that encode, each with its own copy of the model.",
        ge=1,
        flag="Model and machine",
        unset="one per GPU; one on a CPU",
    )
    worker_timeout_s: float = setting(
        1800.0,
        "A local worker that finishes no row for this many seconds is killed, and the others take "
        "over its work. Must be longer than encoding one clip takes.",
        gt=0,
    )
    gpus_per_worker: float | None = setting(
        None,
        "With --launcher ray: GPUs that each actor requests.",
        ge=0,
        flag="Model and machine",
        unset="1; 0 with --device cpu or in a cluster without GPUs",
    )
    view: ViewName = "default"
    dry_run: bool = setting(
        False, "Print what would be encoded, and stop; needs no GPU and no model.", flag="Options"
    )
    vae_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Compute type of the VAE; bfloat16 is about 1 % less accurate."
    )
    tf32: bool = setting(True, "Allow TF32 in the float32 VAE on GPUs that support it.")
    text_dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "Compute type of the text encoder."
    )
    validation_prompts: tuple[str, ...] = setting(
        (), "Additional prompts to encode, for previews during training."
    )
    preview_prompts: tuple[str, ...] = setting(
        (),
        "Encode only this prompt, for train --preview-prompt, with the text encoder of the view; "
        "no manifest is read. Repeat for several.",
        flag="Previews",
        names=("--preview-prompt",),
    )
    decode_workers: int = setting(4, "Threads that decode clips for the encoder.", ge=1, le=64)
    decode_bytes: int = setting(2**30, "Maximum bytes of clips waiting for the encoder.", ge=1)
    decode_check: bool = setting(
        True,
        "Decode the latents of the first clip, and stop if its PSNR is below the variant's limit. "
        "For image-to-video models, compare the first condition with the latents of its clip.",
    )
    store: StoreSettings = StoreSettings()

    @model_validator(mode="after")
    def _gpus_are_rays(self) -> Self:
        if self.gpus_per_worker is not None and self.launcher != "ray":
            raise ValueError(
                "gpus_per_worker needs launcher ray; a local worker always has one GPU of its own"
            )
        return self

    @model_validator(mode="after")
    def _prompts_are_alone(self) -> Self:
        others = {"manifest", "dry_run", "validation_prompts"} & self.model_fields_set
        if self.preview_prompts and others:
            raise ValueError(
                "preview_prompts are encoded without a manifest: leave out "
                + ", ".join(sorted(others))
            )
        return self
