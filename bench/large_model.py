"""A step of T2V-14B from a few of its blocks, and a denoising step: `python bench/large_model.py`.

A block of 14B costs the same in a model of 2 and of 40. So two depths are measured, and the
difference gives the seconds of a block and of what is not in a block; 40 of them are a step of 14B.
Then the seconds of a denoising step of T2V-1.3B with guidance (two forward passes), as previews and
`sample` compute it, eager. Random weights; on a CPU tiny models, whose figures mean nothing.
"""

import itertools
import statistics
import time

import figures
import models
import rates
import step
import torch

from wanlora.core.buckets import Bucket, latent_shape
from wanlora.cost.seconds import model_flops
from wanlora.wan import attention
from wanlora.wan.denoise import denoise

GEOMETRY = "81x480x832"
DEPTHS = (2, 6)
LARGE = "t2v-14b"
SAMPLE_STEPS = 5


def scaled_step(device: torch.device, clock: figures.Clock, *, tiny: bool) -> dict:
    """Seconds of a selective, compiled step of 14B with adapted attention, from two depths."""
    depths = (1, 2) if tiny else DEPTHS
    rows = []
    for depth in depths:
        case = step.make_case(
            GEOMETRY, "attention", device, tiny=tiny, variant=LARGE, num_layers=depth
        )
        case, kernel = step.choose_kernel(case)
        steps = (2, 1) if tiny else (3, 5)
        row = step.measure("selective", case, warmup=steps[0], steps=steps[1], clock=clock)
        if "error" in row:
            raise RuntimeError(f"{depth} blocks: {row['error']}")
        rows.append({k: v for k, v in row.items() if k != "gradients"} | {"blocks": depth})
    shallow, deep = (row["seconds"] for row in rows)
    block = (deep - shallow) / (depths[1] - depths[0])
    layers = models.shape_of(LARGE).num_layers
    seconds = shallow + (layers - depths[0]) * block
    whole = step.make_case(GEOMETRY, "attention", device, tiny=tiny, variant=LARGE)
    tflop = model_flops(whole.work(compiled=True)) / 1e12
    return {
        "seconds_per_block": block, "blocks": layers, "seconds": seconds, "tflop": tflop,
        "tflops": tflop / seconds, "kernel": kernel, "rows": rows,
    }  # fmt: skip


def denoising(device: torch.device, *, tiny: bool) -> dict:
    """Seconds of a denoising step of T2V-1.3B with guidance; the first one is left out."""
    shape = models.TINY if tiny else models.shape_of("t2v-1.3b")
    bucket = rates.TINY if tiny else Bucket(*map(int, GEOMETRY.split("x")))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = models.transformer(shape, device=device, dtype=dtype)
    marks = []

    def mark() -> None:
        rates.synchronize(device)
        marks.append(time.perf_counter())

    prompt = torch.randn(512, shape.text_dim)
    with attention.pinned("auto", device), attention.watched() as operators:
        denoise(
            model, prompt_embeds=prompt, negative_embeds=torch.zeros_like(prompt),
            shape=latent_shape(bucket), steps=2 if tiny else SAMPLE_STEPS,
            guidance_scale=5.0, shift=3.0, seed=0, device=device, dtype=dtype, on_step=mark,
        )  # fmt: skip
    seconds = [later - earlier for earlier, later in itertools.pairwise(marks)]
    return {
        "seconds": statistics.median(seconds), "attention": sorted(operators),
        "peak_gb": rates.peak_gb(device),
    }  # fmt: skip


def main() -> None:
    options = figures.phase_options(__doc__).parse_args()
    cuda = torch.cuda.is_available()
    tiny = options.tiny or not cuda
    device = torch.device("cuda" if cuda else "cpu")
    clock, results = figures.Clock(options.seconds), figures.Results(options.output)
    results.note(machine=rates.machine(), tiny=tiny, geometry=GEOMETRY)
    results.attempt("denoising step", lambda: denoising(device, tiny=tiny))
    rates.free(device)
    results.attempt(f"step of {LARGE}", lambda: scaled_step(device, clock, tiny=tiny))


if __name__ == "__main__":
    main()
