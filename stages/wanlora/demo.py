"""The whole pipeline on the embedded micro model: draw videos, then type the real commands.

Owns: what a newcomer sees first. Every command is printed before it runs, in its own process, as a
reader would type it.
"""

import json
import logging
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora import progress
from wanlora.config import DemoConfig
from wanlora.errors import RunError
from wanlora.files import require_folder, write_atomic
from wanlora.media import mp4
from wanlora.micro import world

VIDEOS_PER_ACTIVITY = 4
CLIP = {"num-frames": "17", "height": "64", "width": "64"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and measured."""

    output_dir: str
    adapter: str
    base_video: str
    adapter_video: str
    clips: int
    raw_bytes: int
    cache_bytes: int
    seconds_per_step: float
    exit_code: int = 0

    def lines(self) -> list[str]:
        """Say what there is to look at, and what was measured."""
        return [
            "",
            f"{self.clips} clips: {self.raw_bytes / 1e6:.2f} MB of decoded frames, "
            f"{self.cache_bytes / 1e6:.2f} MB in the store with their prompts",
            f"{self.seconds_per_step:.3f} s/step on cached latents, no VAE and no text encoder",
            "",
            f"adapter        {self.adapter}",
            f"base video     {self.base_video}",
            f"with adapter   {self.adapter_video}",
            f"the cache      wanlora inspect {Path(self.output_dir) / 'cache'}",
            f"the losses     {Path(self.output_dir) / 'run' / 'metrics.jsonl'}",
            "",
            "The micro model's weights are random, so its videos are texture, not people: this "
            "shows the machinery. On your own videos: see README.md, 'On a GPU'.",
        ]


def run(config: DemoConfig) -> DemoResult:
    """Draw videos and take them through every stage.

    Raises:
        RunError: The folder already holds a demo, or a command failed.
    """
    root = config.output_dir
    require_folder(root, flag="--output-dir")
    if (root / "run").exists():
        raise RunError(f"{root} already holds a demo: remove it, or choose another --output-dir")
    _draw_videos(root / "videos", config.seed)
    data, cache, adapter = root / "data", root / "cache", root / "run"
    seed = ["--seed", str(config.seed)]
    size = [part for name, value in CLIP.items() for part in (f"--{name}", value)]
    prompt = "a blue person clapping on a white background"

    _wanlora("prepare", root / "videos", "--output", data, "--val-fraction", "0.25", *size)
    _wanlora("verify", data, "--limit", "2")
    _wanlora("cache-latents", "--manifest", data, "--cache", cache, "--model", "micro")
    _wanlora("inspect", cache, "--verify")
    _wanlora(
        "train", "--cache", cache, "--output-dir", adapter, "--max-steps", config.max_steps,
        "--batch-size", "2", "--learning-rate", "1e-3", "--save-steps", "20", *seed,
        "--set", "optimizer.warmup_steps=5", "--set", "lora.rank=8",
    )  # fmt: skip
    videos = {}
    for name, flags in (("base", ["--model", "micro"]), ("adapter", ["--adapter", adapter])):
        videos[name] = root / "videos-made" / f"{name}.mp4"
        _wanlora("sample", *flags, "--prompt", prompt, "--output", videos[name], *seed)
    return _result(root, videos)


def _draw_videos(folder: Path, seed: int) -> None:
    """Write a folder per activity, each video with its caption beside it."""
    logger.info("drawing %d videos into %s", 3 * VIDEOS_PER_ACTIVITY, folder)
    total = len(world.ACTIVITIES) * VIDEOS_PER_ACTIVITY
    with progress.bar(total=total, description="draw", unit="video") as bar:
        for activity in world.ACTIVITIES:
            (folder / activity).mkdir(parents=True, exist_ok=True)
            for index in range(VIDEOS_PER_ACTIVITY):
                drawing = world.draw(activity, seed * VIDEOS_PER_ACTIVITY + index)
                path = folder / activity / f"{activity}-{index}.mp4"
                mp4.write(path, drawing.frames, fps=world.FPS, metadata={})
                write_atomic(path.with_suffix(".txt"), f"{drawing.scene.caption}\n".encode())
                bar.update()


def _wanlora(*arguments: Any) -> None:
    """Print a command as it would be typed, and run it in its own process."""
    words = [str(argument) for argument in arguments]
    logger.info("\n$ %s", shlex.join(["wanlora", *words]))
    done = subprocess.run([sys.executable, "-m", "wanlora", *words], check=False)  # noqa: S603
    if done.returncode:
        raise RunError(f"`wanlora {shlex.join(words)}` ended with exit code {done.returncode}")


def _result(root: Path, videos: dict[str, Path]) -> DemoResult:
    inspected = json.loads(
        subprocess.run(  # noqa: S603  (our own command)
            [sys.executable, "-m", "wanlora", "inspect", str(root / "cache"), "--json"],
            check=True, capture_output=True, text=True,
        ).stdout
    )  # fmt: skip
    metrics = [
        json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steady = sorted(2 / row["clips_per_s"] for row in metrics[3:])
    raw = (
        inspected["clips"] * int(CLIP["num-frames"]) * int(CLIP["height"]) * int(CLIP["width"]) * 3
    )
    return DemoResult(
        output_dir=str(root),
        adapter=str(root / "run" / "pytorch_lora_weights.safetensors"),
        base_video=str(videos["base"]),
        adapter_video=str(videos["adapter"]),
        clips=inspected["clips"],
        raw_bytes=raw,
        cache_bytes=inspected["bytes"],
        seconds_per_step=steady[len(steady) // 2],
    )
