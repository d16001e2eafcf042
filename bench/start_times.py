"""Seconds until a command answers: its help, a wrong path, and a right start on tiny data.

    python bench/start_times.py

CPU seconds are those of the process and its children; wall seconds depend on what else runs. A
right start is the smallest job of its kind with the embedded model; "first line" is the time to
the first line on stderr or stdout. Each figure is the median of the repeats, and the minimum.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import figures
import numpy as np
import psutil

from wanlora.media import mp4

REPEATS = 3
MICRO = ("--model", "micro", "--device", "cpu")
PROMPT = ("--prompt", "a dog", "--steps", 1)

WRONG: dict[str, Sequence[object]] = {
    "demo": ("--output-dir", "video.txt"),
    "prepare": ("nowhere",),
    "verify": ("nowhere.jsonl",),
    "cache-latents": ("--manifest", "nowhere.jsonl"),
    "inspect": ("nowhere",),
    "estimate": ("--cache", "nowhere"),
    "train": ("--cache", "nowhere"),
    "watch": ("nowhere",),
    "sample": ("--adapter", "nowhere", *PROMPT),
    "evaluate": ("--adapter", "nowhere"),
    "export": ("--adapter", "nowhere", "--format", "peft", "--output", "peft"),
    "config": ("nothing",),
    "run": ("nowhere.toml",),
}

RIGHT: dict[str, Sequence[object]] = {
    "prepare": (
        "videos", "--num-frames", 5, "--height", 32, "--width", 32, "--edits", "drop",
        "--val-fraction", 0.5,
    ),
    "verify": (),
    "cache-latents": MICRO,
    "inspect": ("cache",),
    "estimate": ("--cache", "cache"),
    "train": ("--cache", "cache", "--device", "cpu", "--max-steps", 1, "--output-dir", "{new}"),
    "sample": ("--adapter", "run", "--device", "cpu", *PROMPT, "--output-dir", "{new}"),
    "evaluate": (
        "--adapter", "run", "--cache", "cache", "--device", "cpu", "--videos-per-activity", 0,
        "--set", "num_sigmas=1", "--output-dir", "{new}",
    ),
    "export": ("--adapter", "run", "--format", "peft", "--output", "{new}"),
    "config": ("train",),
}  # fmt: skip


@dataclass(frozen=True)
class Took:
    """CPU and wall seconds to the first line, and to the end."""

    first_cpu_s: float
    first_s: float
    cpu_s: float
    wall_s: float
    code: int


def run(folder: Path, arguments: Sequence[object], *, program: Sequence[str]) -> Took:
    """Run a process, and read its first line when it appears."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)], cwd=folder, env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    first_s, first_cpu_s = time.perf_counter() - started, _cpu_seconds(process.pid)
    process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu_s = used.ru_utime + used.ru_stime
    return Took(
        first_cpu_s or cpu_s, first_s, cpu_s, time.perf_counter() - started, process.returncode
    )


def _cpu_seconds(pid: int) -> float | None:
    """CPU seconds of a process so far; None if it has just ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return times.user + times.system + times.children_user + times.children_system


def shown(values: Sequence[float]) -> str | None:
    return f"{median(values):.2f} ({min(values):.2f})" if values else None


def repeated(folder: Path, name: str, words: Sequence[object], code: int | None) -> list[Took]:
    return [_once(folder, name, words, code, f"{name}-{n}") for n in range(REPEATS)]


def _once(folder: Path, name: str, words: Sequence[object], code: int | None, new: str) -> Took:
    filled = [str(word).replace("{new}", new) for word in words]
    took = run(folder, (name, *filled), program=("-m", "wanlora"))
    assert took.code in ((1, 2) if code is None else (code,)), (name, words, took.code)
    return took


def prepare_folder(folder: Path) -> None:
    """Make two videos with captions, a cache and a run."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    for number in range(2):
        frames = np.roll(noise, number, axis=1).repeat(8, axis=1).repeat(8, axis=2)
        mp4.write(folder / "videos" / f"{number}.mp4", frames, fps=16)
        (folder / "videos" / f"{number}.txt").write_text("a pattern\n")
    (folder / "video.txt").write_text("a file\n")
    train = (
        "train",
        "--cache",
        "cache",
        "--device",
        "cpu",
        "--max-steps",
        1,
        "--output-dir",
        "run",
    )
    for words in (("prepare", *RIGHT["prepare"]), ("cache-latents", *MICRO), train):
        assert run(folder, words, program=("-m", "wanlora")).code == 0, words


def answers(root: Path, *, tiny: bool) -> list[dict]:
    """CPU seconds of `--help` and CPU and wall seconds of a wrong path: median (minimum)."""
    (root / "video.txt").write_text("a file\n")
    imported = [run(root, (), program=("-c", "import torch")) for _ in range(REPEATS)]
    rows = [_answer("python -c 'import torch'", [], imported)]
    for name in ("inspect",) if tiny else tuple(WRONG):
        asked = repeated(root, name, ("--help",), 0)
        rows.append(_answer(name, asked, repeated(root, name, WRONG[name], None)))
    return rows


def _answer(name: str, asked: list[Took], refused: list[Took]) -> dict:
    return {
        "command": name,
        "--help, CPU s": shown([took.cpu_s for took in asked]),
        "wrong path, CPU s": shown([took.cpu_s for took in refused]),
        "wrong path, s": shown([took.wall_s for took in refused]),
    }


def starts(root: Path, *, tiny: bool) -> list[dict]:
    """CPU seconds of the smallest right job, to its first line and to its end: median (minimum)."""
    prepare_folder(root)
    rows = []
    for name in ("inspect",) if tiny else tuple(RIGHT):
        done = repeated(root, name, RIGHT[name], 0)
        rows.append(
            {
                "command": name,
                "first line, CPU s": shown([took.first_cpu_s for took in done]),
                "first line, s": shown([took.first_s for took in done]),
                "whole job, CPU s": shown([took.cpu_s for took in done]),
            }
        )
    return rows


if __name__ == "__main__":
    figures.main(str(__doc__), {"answers": answers, "starts": starts})
