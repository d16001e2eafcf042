"""Teach the embedded model something it has never seen: draw videos, type the real commands, look.

Owns: what a newcomer sees first. Every command is printed before it runs, in its own process, as a
reader would type it.
"""

import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora import progress
from wanlora.config import DemoConfig
from wanlora.core import units
from wanlora.core.validation import describe_sample
from wanlora.errors import RunError
from wanlora.files import foreign_files, require_folder, write_atomic, write_text
from wanlora.media import mp4
from wanlora.micro import world
from wanlora.wan.variants import DEMO

MARK_NAME = ".wanlora-demo"
"""Empty file in the folder of a demo: no other folder is filled by one."""
NUM_TAUGHT, NUM_HELD_OUT = 36, 12
"""Videos of what is taught."""
VIDEO_PX = 128
"""Drawn larger than the clips, as real videos are."""
BATCH_SIZE = 8
CLIP = {"num-frames": world.NUM_FRAMES, "height": world.SIZE_PX, "width": world.SIZE_PX}
NUM_CLIPS = 24
"""Made by each model for the recogniser."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and measured.

    Attributes:
        base_share: Share of the base's clips in which the concept is recognised.
        adapter_share: The adapter's.
        raw_bytes: The clips' decoded frames.
        cached_s: Seconds a step on the cache.
        one_stage_s: Seconds a step that decodes and encodes its batch first.
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
        """Say what was learned, and where to look."""
        return ["", *(f"{name:<18} {value}" for name, value in self.figures().items()),
                "", f"look at            {self.report}"]  # fmt: skip

    def figures(self) -> dict[str, str]:
        """The summary, by name."""
        found = self.held_out
        base = found["base_mean"]
        low, high = (100 * end / base for end in found["ci95"])
        return {
            "taught": f"{self.concept}, which the base has never seen",
            "held-out loss": f"{base:.4f} base, {found['mean']:.4f} adapter "
            f"({100 * found['difference'] / base:+.1f} %, "
            f"95 % interval {low:+.1f} to {high:+.1f} %, "
            f"{describe_sample(found['num_clips'], found['num_groups'])})",
            "recognised": f"{self.base_share:.0%} of the base's clips, "
            f"{self.adapter_share:.0%} of the adapter's, of {NUM_CLIPS} each",
            "cache": f"{self.clips} clips: {units.size(self.cache_bytes)} in the store, "
            f"{units.size(self.raw_bytes)} decoded",
            "a step": f"{units.duration(self.cached_s)} on the cache, "
            f"{units.duration(self.one_stage_s)} when every step decodes and encodes its clips",
            "adapter": self.adapter,
        }


def run(config: DemoConfig) -> DemoResult:
    """Draw videos and take them through every stage.

    Raises:
        RunError: The folder holds a demo or files of something else, or a command failed.
    """
    root = config.output_dir
    require_folder(root, flag="--output-dir")
    if (root / "run").exists():
        raise RunError(f"{root} already holds a demo: remove it, or choose another --output-dir")
    if (others := foreign_files(root)) and not (root / MARK_NAME).exists():
        raise RunError(
            f"{root} holds {', '.join(others[:3])} and no demo, and the demo could replace files: "
            "choose a new or empty folder with --output-dir"
        )
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / MARK_NAME, "")
    draw_videos(root / "videos", config)
    for command in commands(config):
        wanlora(*command)
    return _result(config)


def commands(config: DemoConfig) -> list[tuple[Any, ...]]:
    """Every command, in the order in which anybody would use them."""
    root = config.output_dir
    data, cache, run_dir = root / "data", root / "cache", root / "run"
    size = [part for name, value in CLIP.items() for part in (f"--{name}", value)]
    seed = ("--seed", config.seed)
    return [
        ("prepare", root / "videos", "--output", data, *size),
        ("verify", data, "--limit", "2"),
        ("cache-latents", "--manifest", data, "--cache", cache, "--model", "micro"),
        ("inspect", cache, "--verify"),
        ("estimate", "--cache", cache),
        (
            "train", "--cache", cache, "--output-dir", run_dir, "--max-steps", config.max_steps,
            "--batch-size", BATCH_SIZE, "--learning-rate", "4e-3", *seed,
            "--rank", "8", "--set", "optimizer.warmup_steps=10",
            "--set", "optimizer.schedule=cosine",
        ),
        (
            "evaluate", "--adapter", run_dir, "--cache", cache, "--output-dir", root / "evaluation",
            "--videos-per-activity", "2", *seed,
        ),
        ("export", "--adapter", run_dir, "--format", "comfyui",
         "--output", root / "comfyui.safetensors"),
    ]  # fmt: skip


def draw_videos(folder: Path, config: DemoConfig) -> None:
    """Draw what is taught, the last quarter of it held out, and some of what the base knows.

    What it knows is mixed in for training alone, or the adapter would forget it.
    """
    first = 100_000 * (1 + config.seed)  # the base was pretrained on the seeds below
    taught = [
        (config.concept, first + index, "val" if index >= NUM_TAUGHT else "train")
        for index in range(NUM_TAUGHT + NUM_HELD_OUT)
    ]
    known = [
        (world.KNOWN[index % len(world.KNOWN)], first + index, "train")
        for index in range(config.known_videos)
    ]
    write_videos(folder, [*taught, *known])


def write_videos(folder: Path, wanted: Sequence[tuple[str, int, str]]) -> None:
    """Write a folder a concept, and a table that says what is on each video.

    Args:
        folder: For the videos and `metadata.csv`.
        wanted: Concept, seed and split of each.
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
    """Print a command as it would be typed, and run it in its own process."""
    words = [str(argument) for argument in arguments]
    logger.info("\n$ %s", shlex.join(["wanlora", *words]))
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "wanlora", *words], check=False, env=os.environ | {DEMO: "1"}
    )
    if done.returncode:
        raise RunError(f"`wanlora {shlex.join(words)}` ended with exit code {done.returncode}")


def _result(config: DemoConfig) -> DemoResult:
    """Measure what no command does, and write the report."""
    from wanlora.demo import measure  # noqa: PLC0415  (imports torch and diffusers)
    from wanlora.demo.page import comparison_gif, demo_page  # noqa: PLC0415

    root = config.output_dir
    logger.info("\nclips of base and adapter, for the same prompts and noise")
    scenes = measure.scenes(config.concept, NUM_CLIPS, seed=config.seed)
    base = measure.make_clips(scenes, None, seed=config.seed)
    adapter = measure.make_clips(scenes, root / "run", seed=config.seed)
    inspected = _inspect(root / "cache")
    cached_s = _seconds_per_step(root / "run" / "metrics.jsonl")
    encoding_s = measure.encoding_seconds(root / "data" / "train.jsonl")
    result = DemoResult(
        concept=config.concept,
        held_out=_held_out(root / "run" / "validation.jsonl"),
        base_share=base.share(config.concept),
        adapter_share=adapter.share(config.concept),
        clips=inspected["clips"],
        raw_bytes=inspected["clips"] * world.NUM_FRAMES * world.SIZE_PX**2 * 3,
        cache_bytes=inspected["bytes"],
        cached_s=cached_s,
        one_stage_s=cached_s + BATCH_SIZE * encoding_s,
        adapter=str(root / "run" / "pytorch_lora_weights.safetensors"),
        report=str(root / "report.html"),
    )
    gif = comparison_gif(base, adapter, fps=world.FPS)
    write_atomic(root / "comparison.gif", gif)
    page = demo_page(
        config.concept, gif, [scene.caption for scene in scenes], base, adapter,
        figures=result.figures(), files=_FILES,
    )  # fmt: skip
    write_text(root / "report.html", page)
    return result


_FILES = {
    "training": "run/run.html",
    "adapter": "run/pytorch_lora_weights.safetensors",
    "evaluation": "evaluation/report.html",
    "for ComfyUI": "comfyui.safetensors",
}


def _inspect(cache: Path) -> dict[str, Any]:
    done = subprocess.run(  # noqa: S603  (our own command)
        [sys.executable, "-m", "wanlora", "inspect", str(cache), "--json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    inspected: dict[str, Any] = json.loads(done.stdout)
    return inspected


def _held_out(validations: Path) -> dict[str, Any]:
    """The run's last validation on held-out clips."""
    rows = [json.loads(line) for line in validations.read_text().splitlines()]
    last: dict[str, Any] = [row for row in rows if row["split"] == "val"][-1]
    return last


def _seconds_per_step(metrics: Path) -> float:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return float(statistics.median(BATCH_SIZE / row["clips_per_s"] for row in rows[3:] or rows))
