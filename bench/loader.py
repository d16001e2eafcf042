"""How long a training step waits for its data: full-size latents, a simulated step.

    python bench/loader.py --clips 1000 --steps 60 --step-s 1.7

Writes a store of random latents of 81x480x832 clips (4 MB each) and 512-token-wide prompts, then
reads micro-batches as `wanlora train` does, sleeping where the step would compute. Prints the share
of the time spent waiting, beside the same without reading ahead.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from wanlora.core.buckets import Bucket, latent_shape
from wanlora.core.fingerprint import sha256_text
from wanlora.store.reader import StoreReader
from wanlora.store.views import Encoding, ViewClip
from wanlora.store.writer import SegmentWriter
from wanlora.training import flow
from wanlora.training.batches import BatchSource, read_ahead
from wanlora.training.order import Order

BUCKET = Bucket(81, 480, 832)
TEXT_DIM = 4096
NUM_PROMPTS = 64


def write_store(cache: Path, num_clips: int) -> dict[str, Encoding]:
    """Fill a store; every clip's latents are different noise, prompts are 60 to 160 rows."""
    random = np.random.default_rng(0)
    shapes = {"latents": latent_shape(BUCKET), "text": (512, TEXT_DIM)}
    encodings = {}
    for kind, shape in shapes.items():
        provenance = {"kind": kind, "made by": "bench/loader.py", "text_dim": TEXT_DIM}
        encodings[kind] = Encoding.of(provenance)
        count = num_clips if kind == "latents" else NUM_PROMPTS
        with SegmentWriter(
            cache, kind=kind, provenance=provenance, shape=shape, dtype="float16", rows=32,
            max_bytes=2**27, max_seconds=1e9,
        ) as writer:  # fmt: skip
            for index in range(count):
                rows = shape if kind == "latents" else (int(random.integers(60, 160)), TEXT_DIM)
                array = random.standard_normal(rows, dtype=np.float32)
                writer.add(sha256_text(f"{kind} {index}"), array, source=None)
    return encodings


def open_source(cache: Path, num_clips: int, encodings: dict[str, Encoding]) -> BatchSource:
    """The source of a run over all clips, one clip a step."""
    clips = [
        ViewClip(
            f"clip-{i}", sha256_text(f"latents {i}"), BUCKET,
            (sha256_text(f"text {i % NUM_PROMPTS}"),), "walking", "train", "",
        )
        for i in range(num_clips)
    ]  # fmt: skip
    return BatchSource(
        reader=StoreReader(cache, encodings=encodings),
        clips={BUCKET: clips},
        order=Order({BUCKET: num_clips}, batch_size=1, seed=0),
        seed=0,
        sampler="logit_normal",
        shift=3.0,
        sigmas=flow.ALL_SIGMAS,
        weighting="none",
        caption_dropout=0.0,
        empty_prompt=clips[0].prompts[0],
        sequence_length=512,
    )


def stalls(source: BatchSource, steps: int, step_s: float, *, ahead: bool) -> list[float]:
    """Seconds that each step waited for its micro-batch."""
    plan = [(step, (0,)) for step in range(steps)]
    waited = []
    if not ahead:
        for step, slots in plan:
            started = time.perf_counter()
            source.read(step, slots)
            waited.append(time.perf_counter() - started)
        return waited
    batches = read_ahead(source, plan, depth=4, device=torch.device("cpu"))
    for _ in plan:
        started = time.perf_counter()
        next(batches).result()
        waited.append(time.perf_counter() - started)
        time.sleep(step_s)
    return waited


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--step-s", type=float, default=1.7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        encodings = write_store(cache, options.clips)
        source = open_source(cache, options.clips, encodings)
        waited = stalls(source, options.steps, options.step_s, ahead=True)
        direct = stalls(source, min(20, options.steps), options.step_s, ahead=False)
    total = sum(waited[1:]) + (options.steps - 1) * options.step_s
    result = {
        "clips": options.clips,
        "steps": options.steps,
        "step_s": options.step_s,
        "stall_pct": 100 * sum(waited[1:]) / total,
        "first_wait_s": waited[0],
        "without_reading_ahead_pct": 100 * np.mean(direct) / (np.mean(direct) + options.step_s),
    }
    for name, value in result.items():
        print(f"{name:28} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
