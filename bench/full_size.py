"""Host memory of each command at the size of Wan2.1-T2V-1.3B, with random weights, on a CPU.

    python bench/full_size.py --work-dir /tmp/full_size
    python bench/full_size.py --work-dir /tmp/full_size --only sample export --frames 5
    python bench/full_size.py --tiny

Builds a model folder (29 GB of disk, reused; see full_model.py) and two drawn videos, then runs
prepare, cache-latents, inspect, train, sample and export through the command line, each in a
process of its own, one at a time. Prints the peak of anonymous and of file-backed memory beside
what the package predicts, and the longest time without a line of output. `--tiny` is the same on a
model of the micro model's size. A command that is refused counts as a result: its message is kept.

UMT5-XXL takes minutes per prompt on a CPU. `--drawn-prompts` writes random embeddings in place of
its output, so that the other commands can be measured without it; the row then says so.

Not part of the model that users have: the values of the weights, and the tokenizer.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import figures
import full_model
import host_memory
import numpy as np
import psutil
import torch

from wanlora import __version__
from wanlora.core.buckets import Bucket
from wanlora.core.units import size
from wanlora.media import mp4
from wanlora.wan.host_memory import loading_bytes
from wanlora.wan.variants import VARIANTS

CPU = torch.device("cpu")
PROMPT = "A person clapping their hands"
NUM_CLIPS = 2
IMPORTS = "import torch, diffusers, transformers, peft"
DRAWN_PROMPTS = """
import sys, types, torch
from wanlora.commands.cache_latents import encode_prompts as stage
width = int(sys.argv.pop(1))
stage._load_text_encoder = lambda settings, encoders: types.SimpleNamespace(tokenizer=None)
stage.wan_encoders.num_prompt_tokens = lambda tokenizer, prompt: 20
stage.wan_encoders.encode_prompts = lambda encoder, prompts: [
    0.2 * torch.randn(20, width, generator=torch.Generator().manual_seed(len(prompt)))
    for prompt in prompts
]
from wanlora.cli import main
main()
"""
RANK = 32


@dataclass(frozen=True)
class Case:
    """A command line to measure.

    Attributes:
        name: Its name in the table.
        words: Arguments after `wanlora`, or of Python.
        predicted: Bytes that the package predicts for it; None = those that it logs, if any.
        clear: Removed before it runs.
    """

    name: str
    words: Sequence[object]
    predicted: float | None = None
    clear: Path | None = None


def cases(work_dir: Path, bucket: Bucket, *, variant: str, drawn_prompts: bool) -> list[Case]:
    """The commands in the order of a user's work."""
    model, data, cache = work_dir / "model", work_dir / "data", work_dir / "cache"
    run, out = work_dir / "run", work_dir / "out"
    device = ("--device", "cpu")
    video = ("--prompt", PROMPT, "--steps", 2, *device, "--overwrite")
    video_size = zip(("--num-frames", "--height", "--width"), bucket, strict=True)
    sizes = [word for pair in video_size for word in pair]
    encode = ("cache-latents", "--manifest", data, "--cache", cache, "--model", model, *device,
              "--set", "decode_check=false")  # fmt: skip
    if drawn_prompts:
        width = VARIANTS[variant].shape.text_dim
        encoding = Case("cache-latents (drawn prompts)", ("-c", DRAWN_PROMPTS, width, *encode),
                        clear=cache)  # fmt: skip
    else:
        encoding = Case("cache-latents", encode, text_bytes(model, torch.bfloat16), cache)
    return [
        Case("(imports alone)", ("-c", IMPORTS)),
        Case("prepare", ("prepare", work_dir / "videos", "--output", data, *sizes, "--model",
                         model, "--val-fraction", 0, "--edits", "drop"), clear=data),
        encoding,
        Case("inspect --verify", ("inspect", cache, "--verify", "full")),
        Case("inspect --decode", ("inspect", cache, "--decode", "{clip}", "--output-dir",
                                  out / "decoded", *device)),
        Case("train", ("train", "--cache", cache, "--output-dir", run, "--max-steps", 2,
                       "--model", model, *device, "--rank", RANK, "--set",
                       "allow_untrained_base=true", "--set", "validation.num_clips=1", "--set",
                       "validation.num_sigmas=1", "--set", "trackers=[]"),
             clear=run),
        Case("train --set dtype=bfloat16", (
            "train", "--cache", cache, "--output-dir", out / "run-bf16", "--max-steps", 1,
            "--model", model, *device, "--rank", RANK, "--set", "dtype=bfloat16", "--set",
            "allow_untrained_base=true", "--set", "validation.every=0", "--set", "trackers=[]"),
            clear=out / "run-bf16"),
        Case("sample", ("sample", "--adapter", run, *video, *sizes, "--output", out / "a.mp4")),
        Case("export --format comfyui", ("export", "--adapter", run, "--format", "comfyui",
                                         "--output", out / "comfyui" / "a.safetensors"),
             clear=out / "comfyui"),
        Case("export --format merged", ("export", "--adapter", run, "--format", "merged",
                                        "--output", out / "merged"), clear=out / "merged"),
    ]  # fmt: skip


def text_bytes(model: Path, dtype: torch.dtype) -> float:
    return float(loading_bytes(model / "text_encoder", dtype=dtype, device=CPU).kept)


def counted(stderr: str) -> float | None:
    """Bytes that `train` counted for the modes it chose, from its log."""
    found = re.search(r"activations .*: ([\d.]+) ([kMG])B counted", stderr)
    return float(found[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[found[2]] if found else None


def measure(
    case: Case, work_dir: Path, environment: Mapping[str, str], *, echo: bool
) -> dict[str, Any]:
    """Run a case; return its row of the JSON document."""
    if case.clear:
        shutil.rmtree(case.clear, ignore_errors=True)
    words = [str(word).replace("{clip}", clip_id(work_dir)) for word in case.words]
    if words[0] != "-c":
        words = ["-m", "wanlora", *words]
    if "--output" in words:
        Path(words[words.index("--output") + 1]).parent.mkdir(parents=True, exist_ok=True)
    free = psutil.virtual_memory().available
    print(f"{case.name}: $ {' '.join(words)}\n  ({size(free)} free)", flush=True)
    code, _, stderr, measured = host_memory.run(
        [sys.executable, *words], environment=environment, echo=echo
    )
    return {
        "command": case.name, "words": [_without(work_dir, word) for word in words],
        "exit_code": code, "free_before": free, "predicted": case.predicted or counted(stderr),
        **{name: _without(work_dir, value) for name, value in asdict(measured).items()},
        "stderr": [_without(work_dir, line) for line in stderr.splitlines()[-40:]],
    }  # fmt: skip


def _without(work_dir: Path, value: Any) -> Any:
    """Leave this machine's folder out of a text, so that figures can be given to others."""
    return value.replace(str(work_dir), "WORK") if isinstance(value, str) else value


def clip_id(work_dir: Path) -> str:
    """A clip of the view; empty before there is one."""
    view = work_dir / "cache" / "views" / "default.jsonl"
    return str(json.loads(view.read_text().splitlines()[1])["clip_id"]) if view.exists() else ""


def draw_videos(folder: Path, bucket: Bucket) -> None:
    """Write two moving patterns; one caption, because each takes minutes to encode."""
    frames, height, width = bucket
    rng = np.random.default_rng(0)
    for number in range(NUM_CLIPS):
        small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = small.repeat(16, axis=0).repeat(16, axis=1)
        moving = np.stack([np.roll(picture, 2 * i, axis=number) for i in range(frames)])
        mp4.write(folder / f"{number}.mp4", moving, fps=16)
        (folder / f"{number}.txt").write_text(PROMPT + "\n")


def row_of(found: Mapping[str, Any]) -> dict[str, object]:
    """A row of the printed table."""
    return {
        "command": found["command"],
        "exit code": found["exit_code"],
        "s": round(found["seconds"]),
        "CPU s": round(found["cpu_seconds"]),
        "peak anonymous": size(found["peak_anonymous"]),
        "predicted": size(found["predicted"]) if found["predicted"] else None,
        "peak file-backed": size(found["peak_file_backed"]),
        "read from disk": size(found["read_from_disk"]),
        "longest silence, s": round(found["longest_silence_s"]),
    }


def measure_all(work_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build what is missing and run the commands; return the JSON document."""
    model = full_model.build(work_dir / "model", tiny=options.tiny)
    bucket = Bucket(options.frames, options.height, options.width)
    videos = work_dir / "videos"
    shutil.rmtree(videos, ignore_errors=True)
    draw_videos(videos, bucket)
    environment = {
        "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "COLUMNS": "120",
        "WANLORA_CACHE_HOME": str(work_dir / "cache-home"),
    }  # fmt: skip
    document = {
        "script": "bench/full_size.py", "version": __version__, "tiny": options.tiny,
        "variant": model["variant"], "model_bytes": model["bytes"], "bucket": list(bucket),
        "threads": options.threads, "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, "
                   f"{size(psutil.virtual_memory().total)} of memory",
        "commands": [],
    }  # fmt: skip
    rows = document["commands"]
    assert isinstance(rows, list)
    every = cases(work_dir, bucket, variant=model["variant"], drawn_prompts=options.drawn_prompts)
    for case in every:
        if options.only and case.name.split()[0] not in options.only:
            continue
        rows.append(measure(case, work_dir, environment, echo=not options.quiet))
        if options.output:  # after each command, so that a stop leaves what was measured
            options.output.write_text(json.dumps(document, indent=1) + "\n")
    return document


def main(run: Callable[[Path, argparse.Namespace], dict[str, Any]] = measure_all) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, help="folder for the model, kept and reused")
    parser.add_argument("--tiny", action="store_true", help="the same at the micro model's size")
    parser.add_argument("--frames", type=int, default=17, help="frames per clip")
    parser.add_argument("--height", type=int, default=240, help="in px")
    parser.add_argument("--width", type=int, default=416, help="in px")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--only", nargs="*", default=[], help="commands to run, such as train")
    parser.add_argument("--drawn-prompts", action="store_true", help="leave out UMT5")
    parser.add_argument("--quiet", action="store_true", help="leave out the commands' own lines")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if options.tiny:
        options.frames, options.height, options.width = 5, 32, 48
    with tempfile.TemporaryDirectory(prefix="wanlora-full-size-") as temporary:
        work_dir = (options.work_dir or Path(temporary)).resolve()
        work_dir.mkdir(parents=True, exist_ok=True)
        document = run(work_dir, options)
    print("\n" + figures.table([row_of(row) for row in document["commands"]]))


if __name__ == "__main__":
    main()
