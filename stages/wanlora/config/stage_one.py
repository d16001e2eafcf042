"""Clips to the store: `cache-latents`, and `inspect`, which looks into it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from wanlora.config.settings import (
    DEFAULT_MODEL,
    CacheDir,
    CacheLocation,
    Device,
    Flag,
    Settings,
    SourceRoot,
    ViewName,
)


class StoreSettings(Settings):
    """How tensors lie in the store."""

    dtype: Annotated[
        Literal["float16", "float32"], Field(description="Type of stored latents and embeddings.")
    ] = "float16"
    clips_per_segment: Annotated[
        int, Field(description="Most clips in a segment (an object of the store).", ge=1, le=512)
    ] = 32
    segment_bytes: Annotated[
        int, Field(description="Most raw bytes in a segment.", ge=1)
    ] = 128 * 2**20  # fmt: skip
    segment_s: Annotated[
        float, Field(description="Most seconds of work in a segment: what a kill can cost.", gt=0)
    ] = 120.0
    latent_mantissa_bits: Annotated[
        int | None,
        Field(
            description="Round latents to so many bits of mantissa before storing; 7 is bfloat16's "
            "accuracy and saves a fifth of the disk. None = keep all.",
            ge=1,
            le=22,
        ),
    ] = None

    @model_validator(mode="after")
    def _bits_fit_the_type(self) -> Self:
        if self.dtype == "float16" and (self.latent_mantissa_bits or 0) > 10:
            raise ValueError(
                f"latent_mantissa_bits {self.latent_mantissa_bits}: float16 has 10 bits"
            )
        return self


class CacheLatentsConfig(Settings):
    """Stage one: run the VAE and the text encoder once over every clip and caption."""

    manifest: Annotated[
        tuple[Path, ...],
        Field(description="Manifest; repeat for several. A folder stands for its train and val."),
        Flag(heading="Input and output"),
    ] = (Path("data/processed"),)
    source_root: SourceRoot = ()
    cache: CacheDir = Path("cache")
    model: Annotated[
        str,
        Field(description="micro (embedded), a local diffusers folder, or a hub id."),
        Flag(heading="Model and machine"),
    ] = DEFAULT_MODEL
    device: Device = "auto"
    launcher: Annotated[
        Literal["local", "ray"],
        Field(
            description="What starts the workers: local, this machine's processes (under torchrun "
            "and srun each rank is one); ray, actors of a cluster (pip install 'wanlora[ray]')."
        ),
        Flag(heading="Model and machine"),
    ] = "local"
    num_workers: Annotated[
        int | None,
        Field(
            description="Processes or actors that encode, each with a model of its own; None = one "
            "a GPU, on a CPU one.",
            ge=1,
        ),
        Flag(heading="Model and machine"),
    ] = None
    worker_timeout_s: Annotated[
        float,
        Field(
            description="A local worker that finishes no row for this many seconds is killed; the "
            "others take over its work. Longer than one clip takes to encode.",
            gt=0,
        ),
    ] = 1800.0
    gpus_per_worker: Annotated[
        float | None,
        Field(
            description="With ray: GPUs that an actor asks for; None = 1, or 0 for device cpu and "
            "in a cluster without any.",
            ge=0,
        ),
        Flag(heading="Model and machine"),
    ] = None
    view: ViewName = "default"
    dry_run: Annotated[
        bool,
        Field(description="Print what would be encoded, and stop; needs neither GPU nor model."),
        Flag(),
    ] = False
    vae_dtype: Annotated[
        Literal["float32", "bfloat16"],
        Field(description="Compute type of the VAE; bfloat16 costs about 1 % accuracy."),
    ] = "float32"
    tf32: Annotated[bool, Field(description="Allow TF32 in the fp32 VAE on a GPU that has it.")] = (
        True
    )
    text_dtype: Annotated[
        Literal["bfloat16", "float32"], Field(description="Compute type of the text encoder.")
    ] = "bfloat16"
    validation_prompts: Annotated[
        tuple[str, ...], Field(description="More prompts to encode, for previews while training.")
    ] = ()
    preview_prompts: Annotated[
        tuple[str, ...],
        Field(
            description="Only encode this prompt for previews of training (train "
            "--preview-prompt), with the text encoder of the view; no manifest is read."
        ),
        Flag("--preview-prompt", heading="Previews"),
    ] = ()
    decode_workers: Annotated[
        int, Field(description="Threads that decode clips ahead of the encoder.", ge=1, le=64)
    ] = 4
    decode_bytes: Annotated[
        int, Field(description="Most bytes of decoded clips waiting for the encoder.", ge=1)
    ] = 2**30
    decode_check: Annotated[
        bool,
        Field(
            description="Decode the first clip back and refuse a VAE that cannot (PSNR under the "
            "variant's limit)."
        ),
    ] = True
    store: StoreSettings = StoreSettings()

    @model_validator(mode="after")
    def _gpus_are_rays(self) -> Self:
        if self.gpus_per_worker is not None and self.launcher != "ray":
            raise ValueError(
                "gpus_per_worker goes with launcher ray; a local worker has one GPU of its own"
            )
        return self

    @model_validator(mode="after")
    def _prompts_are_alone(self) -> Self:
        others = {"manifest", "dry_run", "validation_prompts"} & self.model_fields_set
        if self.preview_prompts and others:
            raise ValueError(
                "preview_prompts are encoded alone, without any manifest: leave out "
                + ", ".join(sorted(others))
            )
        return self


class InspectConfig(Settings):
    """What is in a cache, whether it is whole, mend, clean; or what is in an adapter."""

    path: Annotated[
        CacheLocation,
        Field(description="Cache folder or URL; or a run's folder, PEFT's, or an adapter file."),
        Flag(argument=True, heading="Input and output"),
    ] = Path("cache")
    verify: Annotated[
        Literal["fast", "full"] | None,
        BeforeValidator(lambda value: {True: "full", False: None}.get(value, value)),
        Field(
            description="fast: commit records and the sizes of objects; full (--verify alone): "
            "read every row, checksum, finite, not constant."
        ),
        Flag(bare="full", heading="Maintenance"),
    ] = None
    repair: Annotated[
        bool,
        Field(description="Verify in full, drop what is bad, and encode just that again."),
        Flag(heading="Maintenance"),
    ] = False
    gc: Annotated[
        bool,
        Field(
            description="Free rows that no view and no unfinished run names, repeated rows, and "
            "what kills have left."
        ),
        Flag(heading="Maintenance"),
    ] = False
    dry_run: Annotated[
        bool,
        Field(description="With --gc: say what would be freed, and stop."),
        Flag(heading="Maintenance"),
    ] = False
    html: Annotated[
        Path | None,
        Field(description="Write a page with a picture strip, caption and statistics per clip."),
        Flag(heading="Input and output"),
    ] = None
    decode: Annotated[
        tuple[str, ...],
        Field(
            description="Clip id, or the start of a key: decode it with the VAE to an mp4 beside "
            "its source; repeat for several."
        ),
        Flag(heading="Input and output"),
    ] = ()
    output_dir: Annotated[
        Path, Field(description="Folder for decoded clips."), Flag(heading="Input and output")
    ] = Path("outputs/decoded")
    manifest: Annotated[
        tuple[Path, ...],
        Field(description="With --repair: the manifests that the cache was made from."),
        Flag(heading="Input and output"),
    ] = (Path("data/processed"),)
    source_root: SourceRoot = ()
    device: Device = "auto"
    statistics_clips: Annotated[
        int,
        Field(
            description="Clips of each bucket that statistics are taken over, evenly spaced; "
            "--verify full and --html take all.",
            ge=0,
        ),
    ] = 32
    html_clips: Annotated[
        int, Field(description="Maximum number of clips on the page, about 10 kB each.", ge=1)
    ] = 1000
    gc_min_age_h: Annotated[
        float,
        Field(
            description="Minimum age in hours of the rows that --gc may delete because no view and "
            "no unfinished run of cache-latents names them.",
            ge=0,
        ),
    ] = 24.0
    gc_drop_wants: Annotated[
        tuple[str, ...],
        Field(
            description="With --gc: unfinished runs of cache-latents whose rows may be freed, by "
            "the names that inspect lists."
        ),
    ] = ()
    store: StoreSettings = StoreSettings()

    @model_validator(mode="after")
    def _one_job(self) -> Self:
        if self.repair and self.gc:
            raise ValueError("repair and gc: run one after the other")
        if self.dry_run and not self.gc:
            raise ValueError("dry_run goes with gc")
        if self.gc_drop_wants and not self.gc:
            raise ValueError("gc_drop_wants goes with gc")
        return self
