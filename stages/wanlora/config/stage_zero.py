"""Videos to clips: `prepare` and `verify`. Each setting is described once, here."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from wanlora.config.settings import DEFAULT_MODEL, Flag, Seed, Settings, SourceRoot, TokenizerOf
from wanlora.core.buckets import DEFAULT_FPS, MAX_FPS, MIN_FPS, Bucket, problem_with


class PrepareConfig(Settings):
    """Videos and captions to a manifest; the pixels stay in the source videos."""

    sources: Annotated[
        tuple[Path, ...],
        Field(description="Folders of videos or images, or single files.", min_length=1),
        Flag(argument=True, heading="Input and output"),
    ]
    output: Annotated[
        Path, Field(description="Folder for train.jsonl, val.jsonl and errors.jsonl."),
        Flag("--output", "--output-dir", heading="Input and output"),
    ] = Path("data/processed")  # fmt: skip
    captions: Annotated[
        Path | None,
        Field(
            description="JSONL, JSON or CSV with a path and a caption for each video; "
            "without it, a .txt beside each video, or a table in its folder (metadata.jsonl, "
            "metadata.csv, captions.json, prompts.txt with videos.txt ...)."
        ),
        Flag(heading="Input and output"),
    ] = None
    caption_prefix: Annotated[
        str,
        Field(description="Trigger words put before every caption that does not start with them."),
        Flag(heading="Clips"),
    ] = ""
    num_frames: Annotated[
        int, Field(description="Frames in a clip, 4k+1.", ge=1), Flag(heading="Clips")
    ] = 81
    height: Annotated[
        int, Field(description="Clip height in px, a multiple of 16."), Flag(heading="Clips")
    ] = 480
    width: Annotated[
        int, Field(description="Clip width in px, a multiple of 16."), Flag(heading="Clips")
    ] = 832
    fps: Annotated[
        float,
        Field(description="Frames per second of a clip.", ge=MIN_FPS, le=MAX_FPS),
        Flag(heading="Clips"),
    ] = DEFAULT_FPS
    buckets: Annotated[
        bool,
        Field(
            description="Keep each video's aspect: the size of most kept pixels with an area of at "
            "most height x width, multiples of 16, portrait too; short videos become 17, 33, 49 "
            "... frames."
        ),
        Flag(heading="Clips"),
    ] = False
    mode: Annotated[
        Literal["chunk", "head", "middle", "slide", "uniform"],
        Field(
            description="chunk: as many clips as fit, end to end; head, middle: one; slide: one "
            "every `stride` frames; uniform: `count`, spread evenly."
        ),
        Flag(heading="Clips"),
    ] = "chunk"
    stride: Annotated[
        int | None,
        Field(description="slide: frames from clip to clip; None = half a clip.", ge=1),
        Flag(heading="Clips"),
    ] = None
    count: Annotated[
        int, Field(description="uniform: clips of a video.", ge=1), Flag(heading="Clips")
    ] = 4
    short: Annotated[
        Literal["trim", "drop"],
        Field(
            description="A video or scene shorter than a clip: trim it to the longest 4k+1 "
            "frames (at least min_frames), or drop it."
        ),
        Flag(heading="Clips"),
    ] = "trim"
    min_frames: Annotated[
        int, Field(description="Shortest clip that trim may leave, 4k+1 frames.", ge=1)
    ] = 17
    lengths: Annotated[
        tuple[int, ...],
        Field(
            description="Frames that trim may leave, as [17, 33, 49]; [] = any 4k+1, or with "
            "buckets 17, 33, 49 ... frames."
        ),
    ] = ()
    scenes: Annotated[
        Literal["builtin", "pyscenedetect", "allow"],
        Field(
            description="No clip crosses a scene cut. builtin finds near-certain hard cuts, "
            "pyscenedetect (pip install 'wanlora[scenes]') more; allow: clips may cross cuts, "
            "with a warning."
        ),
        Flag(heading="Clips"),
    ] = "builtin"
    val_fraction: Annotated[
        float,
        Field(description="Share of source videos held out for validation.", ge=0, lt=1),
        Flag(heading="Clips"),
    ] = 0.05
    group_pattern: Annotated[
        str | None,
        Field(
            description="Regex whose first group names the source of an .npz clip by its stem, so "
            "that clips of one video never stand on both sides of the split."
        ),
    ] = None
    allow_hdr: Annotated[
        bool, Field(description="Accept HDR (PQ, HLG) video although nothing tone-maps it.")
    ] = False
    allow_low_fps: Annotated[
        bool, Field(description="Accept video of fewer frames a second than fps: frames repeat.")
    ] = False
    max_error_rate: Annotated[
        float,
        Field(description="Exit with 3 when more than this share of the sources fails.", ge=0),
    ] = 0.0
    workers: Annotated[
        int,
        Field(
            description="Processes that check files; 0 = one a core. 1 = this process, which a bad "
            "file could then crash or hang.",
            ge=0,
        ),
        Flag(heading="Model and machine"),
    ] = 0
    stall_s: Annotated[
        float, Field(description="A file whose decoding stands still for so long fails.", gt=0)
    ] = 60.0
    dry_run: Annotated[
        bool, Field(description="Check everything, show the plan, write no manifest."), Flag()
    ] = False
    edits: Annotated[
        Literal["keep", "drop"] | None,
        Field(
            description="A manifest that was edited by hand since prepare wrote it: keep the "
            "edits, or drop them; None = refuse to replace it. The edited file is copied to *.bak."
        ),
        Flag(heading="Input and output"),
    ] = None
    html: Annotated[
        Path | None,
        Field(description="Write a contact sheet of the clips to this file."),
        Flag(heading="Input and output"),
    ] = None
    html_clips: Annotated[
        int, Field(description="Maximum number of clips on the page, about 10 kB each.", ge=1)
    ] = 1000
    materialize: Annotated[
        Literal["npz"] | None,
        Field(description="Also write every clip's frames to OUTPUT/clips, 97 MB each at 480p."),
        Flag(heading="Input and output"),
    ] = None
    model: TokenizerOf = DEFAULT_MODEL
    seed: Annotated[Seed, Flag(heading="Clips")] = 0

    @model_validator(mode="after")
    def _sizes_fit_wan(self) -> Self:
        for frames in (self.num_frames, self.min_frames, *self.lengths):
            if problem := problem_with(Bucket(frames, self.height, self.width)):
                raise ValueError(problem)
        unusable = [n for n in self.lengths if not self.min_frames <= n <= self.num_frames]
        if unusable:
            raise ValueError(
                f"lengths {unusable[0]}: expected min_frames {self.min_frames} to num_frames "
                f"{self.num_frames}"
            )
        return self


class VerifyConfig(Settings):
    """Load clips exactly as stage one will, and list what could not be used and why."""

    manifests: Annotated[
        tuple[Path, ...],
        Field(description="Manifest files, or a folder holding train.jsonl and val.jsonl."),
        Flag(argument=True, heading="Input and output"),
    ] = (Path("data/processed"),)
    source_root: SourceRoot = ()
    limit: Annotated[
        int,
        Field(description="Load only the first N clips of each manifest; 0 = all.", ge=0),
        Flag(),
    ] = 0
    html: Annotated[
        Path | None,
        Field(description="Write a contact sheet of the clips loaded to this file."),
        Flag(heading="Input and output"),
    ] = None
    html_clips: Annotated[
        int, Field(description="Maximum number of clips on the page, about 10 kB each.", ge=1)
    ] = 1000
    model: TokenizerOf = DEFAULT_MODEL
