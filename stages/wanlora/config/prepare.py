"""Settings of `wanlora prepare`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import model_validator

from wanlora.config.settings import (
    DEFAULT_MODEL,
    HtmlClips,
    Settings,
    TokenizerOf,
    described,
    seed_setting,
    setting,
)
from wanlora.core.buckets import DEFAULT_FPS, MAX_FPS, MIN_FPS, Bucket, problem_with


class PrepareConfig(Settings):
    """Write a manifest of clips and captions. The pixels stay in the source videos."""

    sources: Annotated[
        tuple[Path, ...],
        described(
            "Video or image files, or folders that contain them.",
            flag="Input and output",
            argument=True,
            min_length=1,
        ),
    ]
    output: Path = setting(
        Path("data/processed"),
        "Folder for train.jsonl, val.jsonl and errors.jsonl.",
        flag="Input and output",
        names=("--output", "--output-dir"),
    )
    captions: Path | None = setting(
        None,
        "JSONL, JSON or CSV file with a path and a caption per video; all other caption sources "
        "are then ignored. Without it, captions are read from a .txt file next to each video, or "
        "from a table in its folder (metadata.jsonl, metadata.csv, captions.json, prompts.txt with "
        "videos.txt, ...).",
        flag="Input and output",
    )
    caption_prefix: str = setting(
        "", "Trigger words to put before each caption that does not start with them.", flag="Clips"
    )
    num_frames: int = setting(81, "Frames per clip, 4k+1.", ge=1, flag="Clips")
    height: int = setting(480, "Clip height in pixels, a multiple of 16.", flag="Clips")
    width: int = setting(832, "Clip width in pixels, a multiple of 16.", flag="Clips")
    fps: float = setting(
        DEFAULT_FPS, "Frames per second of the clips.", ge=MIN_FPS, le=MAX_FPS, flag="Clips"
    )
    buckets: bool = setting(
        False,
        "Keep the aspect ratio of each video: use the size that keeps the most pixels, with an "
        "area of at most height x width and sides that are multiples of 16 (portrait too). Short "
        "videos become clips of 17, 33, 49, ... frames.",
        flag="Clips",
    )
    mode: Literal["chunk", "head", "middle", "slide", "uniform"] = setting(
        "chunk",
        "Clips to cut from a video. chunk: as many as fit, end to end; head, middle: one clip; "
        "slide: one clip every `stride` frames; uniform: `count` clips, evenly spaced.",
        flag="Clips",
    )
    stride: int | None = setting(
        None,
        "With --mode slide: frames from the start of one clip to the next.",
        ge=1,
        flag="Clips",
        unset="half a clip",
    )
    count: int = setting(4, "With --mode uniform: clips per video.", ge=1, flag="Clips")
    short: Literal["trim", "drop"] = setting(
        "trim",
        "Videos and scenes shorter than a clip. trim: make a clip of the largest 4k+1 frames that "
        "fit (at least min_frames); drop: leave them out.",
        flag="Clips",
    )
    min_frames: int = setting(17, "Minimum number of frames of a trimmed clip, 4k+1.", ge=1)
    lengths: tuple[int, ...] = setting(
        (),
        "Numbers of frames that a trimmed clip may have, for example [17, 33, 49]. Empty: any "
        "4k+1; with buckets 17, 33, 49, ...",
    )
    scenes: Literal["builtin", "pyscenedetect", "allow"] = setting(
        "builtin",
        "Scene cut detector; no clip crosses a scene cut. builtin: finds hard cuts that are almost "
        "certain; pyscenedetect: finds more (pip install 'wanlora[scenes]'); allow: clips may "
        "cross cuts, with a warning.",
        flag="Clips",
    )
    val_fraction: float = setting(
        0.05, "Fraction of the source videos held out for validation.", ge=0, lt=1, flag="Clips"
    )
    group_pattern: str | None = setting(
        None,
        "Regular expression for the file names (without extension) of .npz clips. Its first group "
        "is the source video of a clip; all clips of a source are in the same split.",
    )
    allow_hdr: bool = setting(False, "Accept HDR videos (PQ, HLG), without tone mapping.")
    allow_low_fps: bool = setting(
        False, "Accept videos with fewer frames per second than fps; frames are then repeated."
    )
    max_error_rate: float = setting(
        0.0, "Exit with code 3 if more than this fraction of the sources fails.", ge=0
    )
    workers: int = setting(
        0,
        "Number of processes that check files; 0 = one per core. With 1, this process checks "
        "them, and a corrupt file can crash or block it.",
        ge=0,
        flag="Model and machine",
    )
    stall_s: float = setting(60.0, "Seconds without progress until decoding a file fails.", gt=0)
    dry_run: bool = setting(
        False, "Check all files and print the plan, but write no manifest.", flag="Options"
    )
    edits: Literal["keep", "drop"] | None = setting(
        None,
        "Keep or drop changes that were made by hand to a manifest that prepare wrote. The edited "
        "file is copied to *.bak.",
        flag="Input and output",
        unset="stop with an error",
    )
    html: Path | None = setting(
        None, "Write a contact sheet of the clips to this file.", flag="Input and output"
    )
    html_clips: HtmlClips = 1000
    materialize: Literal["npz"] | None = setting(
        None,
        "Also write the frames of each clip to OUTPUT/clips; 97 MB per clip at 480p.",
        flag="Input and output",
    )
    model: TokenizerOf = DEFAULT_MODEL
    seed: int = seed_setting("Clips")

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
