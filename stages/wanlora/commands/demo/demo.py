"""`wanlora demo`: draw videos, run the real commands on them, and measure what the model learned.

Owns: the steps and their order. Every command is printed before it runs in its own process, as a
user would type it.
"""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from wanlora import __version__, progress
from wanlora.commands.demo.demo_folder import mark_done, open_folder
from wanlora.config import DemoConfig
from wanlora.core import units
from wanlora.core.intervals import describe_change, describe_sample
from wanlora.errors import RunError
from wanlora.files import write_text
from wanlora.media import mp4
from wanlora.micro import world
from wanlora.runs.run_folder import newest_checkpoint
from wanlora.wan.model_folder import DEMO, MICRO, TRANSFORMER, resolve
from wanlora.wan.weights import weights_sha256

NUM_TAUGHT, NUM_HELD_OUT = 36, 12
"""Videos of the taught concept."""
VIDEO_PX = 128
"""Height and width of the videos; larger than the clips, as for real videos."""
BATCH_SIZE = 8
CLIP = {"num-frames": world.NUM_FRAMES, "height": world.SIZE_PX, "width": world.SIZE_PX}
NUM_CLIPS = 24
"""Clips that each model generates for the recogniser."""
SAVE_STEPS = 50
"""Steps between checkpoints, for an interrupted demo."""
STEPS = (
    "draw", "prepare", "verify", "cache-latents", "inspect", "estimate", "train", "evaluate",
    "export", "report",
)  # fmt: skip
"""Steps in order; those between the first and the last are commands of `wanlora`."""
REPORT = "report.html"
OUTPUTS = {
    "draw": "videos/metadata.csv",
    "prepare": "data/train.jsonl",
    "cache-latents": "cache/store.zarr",
    "train": "run/pytorch_lora_weights.safetensors",
    "evaluate": "evaluation/report.html",
    "export": "comfyui.safetensors",
    "report": REPORT,
}
"""Last file that each step writes; without it the step is run again."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoResult:
    """Measurements of the demo, and its files.

    Attributes:
        concept: The taught concept.
        held_out: Last validation on held-out clips.
        base_share: Share of the base's clips in which the concept is recognised.
        adapter_share: Share of the adapter's clips in which the concept is recognised.
        clips: Number of clips in the cache.
        raw_bytes: Size of the clips' decoded frames.
        cache_bytes: Size of the store.
        cached_s: Seconds per step on the cache.
        one_stage_s: Seconds per step that decodes and encodes its batch first.
        adapter: Path of the adapter.
        report: Path of the report.
    """

    concept: str
    held_out: dict[str, Any]
    base_share: float
    adapter_share: float
    clips: int
    raw_bytes: int
    cache_bytes: int
    cached_s: float
    one_stage_s: float
    adapter: str
    report: str
    exit_code: int = 0

    def lines(self) -> list[str]:
        """Format the measurements, and the path of the report."""
        return ["", *(f"{name:<18} {value}" for name, value in self.figures().items()),
                "", f"look at            {self.report}"]  # fmt: skip

    def figures(self) -> dict[str, str]:
        """Format each measurement."""
        found = self.held_out
        base = found["base_mean"]
        change = describe_change(found["difference"], base, found["ci95"], decimals=1)
        return {
            "taught": f"{self.concept}; the base model was not trained on it",
            "held-out loss": f"{base:.4f} base, {found['mean']:.4f} adapter "
            f"({change}, {describe_sample(found['num_clips'], found['num_groups'])})",
            "recognised": f"{self.base_share:.0%} of the base's clips, "
            f"{self.adapter_share:.0%} of the adapter's, of {NUM_CLIPS} each",
            "cache": f"{self.clips} clips: {units.size(self.cache_bytes)} in the store, "
            f"{units.size(self.raw_bytes)} decoded",
            "a step": f"{units.duration(self.cached_s)} on the cache, "
            f"{units.duration(self.one_stage_s)} when every step decodes and encodes its clips",
            "adapter": self.adapter,
        }


@dataclass(frozen=True, slots=True)
class Lesson:
    """Content and length of the demo's training.

    Attributes:
        concept: Concept that the base model was not trained on.
        num_known: Videos of known concepts.
        max_steps: Training steps.
        seed: Seed of the videos, the training and the noise.
    """

    concept: str
    num_known: int
    max_steps: int
    seed: int


def run(config: DemoConfig) -> DemoResult:
    """Draw videos and run every stage on them. Steps that an earlier run finished are skipped.

    Raises:
        RunError: The folder holds other files or another demo, or a command failed.
        OutputError: The folder cannot be written.
    """
    root = config.output_dir
    settings = config.model_dump(mode="json", exclude={"output_dir"})
    lesson = Lesson(config.concept, config.known_videos, config.max_steps, config.seed)
    base = weights_sha256(resolve(MICRO, TRANSFORMER) / "transformer")
    identity = {"version": __version__, "base": base, **settings}
    with open_folder(root, identity) as record:
        todo = _todo(root, record)
        if not todo:
            logger.info("%s holds this demo already, complete; its report:", root)
        elif record["done"]:
            logger.info("continuing the demo in %s with: %s", root, todo[0])
        for step in todo:
            record["result"] = _run_step(step, root, lesson) or record["result"]
            mark_done(root, record, step)
    return DemoResult(
        **record["result"], adapter=str(root / OUTPUTS["train"]), report=str(root / REPORT)
    )


def _todo(root: Path, record: dict[str, Any]) -> list[str]:
    """List the steps from the first one that is not done or whose output is missing."""
    done = [
        name in record["done"] and all((root / path).exists() for path in _outputs(name))
        for name in STEPS
    ]
    return list(STEPS[done.index(False) :]) if False in done else []


def _outputs(step: str) -> tuple[str, ...]:
    return (OUTPUTS[step],) if step in OUTPUTS else ()


def _run_step(step: str, root: Path, lesson: Lesson) -> dict[str, Any] | None:
    """Run one of `STEPS`; the last one returns the result."""
    if step == "draw":
        draw_videos(root / "videos", lesson.concept, num_known=lesson.num_known, seed=lesson.seed)
    elif step == "report":
        # Imported here because it needs torch, which a finished demo does not.
        summarise = import_module("wanlora.commands.demo.summary").summarise
        summary: dict[str, Any] = summarise(root, lesson.concept, seed=lesson.seed)
        return summary
    else:
        known = commands(root, max_steps=lesson.max_steps, seed=lesson.seed)
        wanlora(*next(words for words in known if words[0] == step))
    return None


def commands(root: Path, *, max_steps: int, seed: int) -> list[tuple[Any, ...]]:
    """List the commands of the demo in a folder, in order.

    Args:
        root: Folder of the demo.
        max_steps: Training steps.
        seed: Seed of training and of the videos in the evaluation.
    """
    data, cache, run_dir = root / "data", root / "cache", root / "run"
    size = [part for name, value in CLIP.items() for part in (f"--{name}", value)]
    # After a kill, training continues and an export is made again.
    resume = ("--resume",) if newest_checkpoint(run_dir) else ()
    overwrite = ("--overwrite",) if (root / OUTPUTS["export"]).exists() else ()
    return [
        ("prepare", root / "videos", "--output", data, *size),
        ("verify", data, "--limit", "2"),
        ("cache-latents", "--manifest", data, "--cache", cache, "--model", "micro"),
        ("inspect", cache, "--verify"),
        ("estimate", "--cache", cache),
        (
            "train", "--cache", cache, "--output-dir", run_dir, "--max-steps", max_steps,
            "--batch-size", BATCH_SIZE, "--learning-rate", "4e-3", "--seed", seed,
            "--rank", "8", "--set", "optimizer.warmup_steps=10",
            "--set", "optimizer.schedule=cosine", "--save-steps", SAVE_STEPS, *resume,
        ),
        (
            "evaluate", "--adapter", run_dir, "--cache", cache, "--output-dir", root / "evaluation",
            "--videos-per-activity", "2", "--seed", seed,
        ),
        ("export", "--adapter", run_dir, "--format", "comfyui",
         "--output", root / OUTPUTS["export"], *overwrite),
    ]  # fmt: skip


def draw_videos(folder: Path, concept: str, *, num_known: int, seed: int) -> None:
    """Draw videos of a new concept and of concepts that the base model was trained on.

    A quarter of the new concept's videos are held out. The videos of known concepts are only for
    training: without them the model would forget these concepts.

    Args:
        folder: Folder for the videos and `metadata.csv`.
        concept: The new concept.
        num_known: Number of videos of known concepts.
        seed: Seed of the demo.
    """
    first = 100_000 * (1 + seed)  # the base was pretrained on the seeds below
    taught = [
        (concept, first + index, "val" if index >= NUM_TAUGHT else "train")
        for index in range(NUM_TAUGHT + NUM_HELD_OUT)
    ]
    known = [
        (world.KNOWN[index % len(world.KNOWN)], first + index, "train")
        for index in range(num_known)
    ]
    write_videos(folder, [*taught, *known])


def write_videos(folder: Path, wanted: Sequence[tuple[str, int, str]]) -> None:
    """Draw videos into one folder per concept, and write a table of their captions.

    Args:
        folder: For the videos and `metadata.csv`.
        wanted: Concept, seed and split of each video.
    """
    logger.info("drawing %d videos into %s", len(wanted), folder)
    rows = ["file_name,text,activity,split"]
    with progress.bar(total=len(wanted), description="draw", unit="video") as bar:
        for concept, seed, split in wanted:
            drawing = world.draw(concept, seed, size_px=VIDEO_PX)
            name = f"{concept}/{concept}-{seed}.mp4"
            mp4.write(folder / name, drawing.frames, fps=world.FPS)
            rows.append(f"{name},{drawing.scene.caption},{concept},{split}")
            bar.update()
    write_text(folder / "metadata.csv", "\n".join(rows) + "\n")


def wanlora(*arguments: Any) -> None:
    """Log a command as a user would type it, and run it in its own process.

    Raises:
        RunError: It failed.
    """
    words = [str(argument) for argument in arguments]
    logger.info("\n$ %s", shlex.join(["wanlora", *words]))
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "wanlora", *words], check=False, env=os.environ | {DEMO: "1"}
    )
    if done.returncode:
        raise RunError(
            f"`wanlora {shlex.join(words)}` ended with exit code {done.returncode}; to continue "
            "from here, run the demo again"
        )
