"""Streamed blocks of T2V-14B beside resident ones and usual swapping: `python bench/streaming.py`.

A few blocks of the real size with random weights, full recomputation, adapted attention. First the
rate of copies from pinned host memory. Then steps of a long and of a short clip, compiled:

    resident    all blocks on the device
    streamed    all blocks in host memory, copied ahead into two slots
    swapped     all blocks in host memory, one slot: copy, wait, compute, as trainers usually do
    offload     streamed, with the inputs of blocks in host memory too
    int8        resident, with 8-bit weights; streamed int8: both

The long clip should hide the copies of `streamed`; the short one cannot. `counted` has what
`wanlora.cost` predicts for all 40 blocks. On a CPU a tiny model, whose figures mean nothing.
"""

import argparse
import statistics
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import figures
import models
import rates
import step
import torch

from wanlora.cost.gpus import GPUS, Gpu, gpu_of
from wanlora.cost.memory import NUM_SLOTS, block_linear_bytes, host_bytes, step_bytes
from wanlora.cost.streaming import PCIE_BYTES_PER_S, predict_streaming
from wanlora.wan.blocks import set_activations
from wanlora.wan.streaming import stream_blocks

VARIANT = "t2v-14b"
GEOMETRIES = ("81x480x832", "17x480x832")
NUM_BLOCKS = 6
SLOTS = {"resident": 0, "streamed": NUM_SLOTS, "swapped": 1}
FULL = "full"


class Way(NamedTuple):
    """A variant of the steps."""

    slots: int
    mode: str = FULL
    quantize: str = "none"


WAYS = {
    **{name: Way(slots) for name, slots in SLOTS.items()},
    "offload": Way(NUM_SLOTS, "offload"),
    "int8": Way(0, quantize="int8"),
    "streamed int8": Way(NUM_SLOTS, quantize="int8"),
}


def copy_gb_s(device: torch.device, *, tiny: bool) -> float:
    """GB/s of copying the weights of a block from pinned host memory; on a CPU within it."""
    shape = models.TINY if tiny else models.shape_of(VARIANT)
    source = torch.empty(int(block_linear_bytes(shape)), dtype=torch.uint8)
    source = source.pin_memory() if device.type == "cuda" else source
    target = torch.empty_like(source, device=device)
    copy = partial(target.copy_, source, non_blocking=True)
    rates.timed(copy, device, 2)
    return source.numel() / statistics.median(rates.timed(copy, device, rates.REPEATS)) / 1e9


def make(case: step.Case, way: Way) -> step.Step:
    """Build a variant."""
    model = models.transformer(
        case.shape, targets=case.targets, rank=rates.RANK, device=case.device, dtype=case.dtype,
        quantize=way.quantize,
    )  # fmt: skip
    if way.slots:
        stream_blocks(model, case.shape.num_layers, device=case.device, slots=way.slots)
    set_activations(model, (way.mode,) * case.shape.num_layers, compiled=case.fused)
    return step.masters_step(case, model, case.kernel, way.mode)


def steps_of(geometry: str, device: torch.device, clock: figures.Clock, *, tiny: bool) -> dict:
    """Seconds and memory of each variant; loss and gradients against those of resident blocks."""
    case = step.make_case(
        geometry, "attention", device, tiny=tiny, variant=VARIANT,
        num_layers=3 if tiny else NUM_BLOCKS,
    )  # fmt: skip
    case, kernel = step.choose_kernel(case)
    rows: list[dict] = []
    expected: dict[str, dict] = {}
    for name, way in WAYS.items():
        if clock.left_s < 0:
            rows.append({"variant": name, "error": "not measured: no time was left"})
            continue
        row = step.measure(
            name, case, warmup=2, steps=1 if tiny else 5, clock=clock,
            make=partial(make, case, way),
        )  # fmt: skip
        gradients = row.pop("gradients", None)
        if gradients:
            same = expected.setdefault(way.quantize, row | {"gradients": gradients})
            row["same_loss"] = row["loss"] == same["loss"]
            row["gradient_cosine"] = step.cosine(gradients, same["gradients"])
        rows.append(row)
    return {"blocks": case.shape.num_layers, "kernel": kernel, "rows": rows}


def counted(gpu: Gpu, bytes_per_s: float, *, quantize: str) -> list[dict]:
    """Bytes and seconds of the whole model, predicted."""
    rows = []
    for geometry in GEOMETRIES:
        case = step.make_case(
            geometry, "attention", torch.device("cpu"), tiny=False, variant=VARIANT
        )
        modes = (FULL,) * case.shape.num_layers
        for way, slots in SLOTS.items():
            work = replace(
                case.work(compiled=True), element_bytes=2, quantize=quantize,
                num_streamed=case.shape.num_layers if slots else 0,
            )  # fmt: skip
            unused = (slots == 1) * block_linear_bytes(case.shape, 2, quantize)
            copies = predict_streaming(work, modes, gpu, bytes_per_s, slots=slots or NUM_SLOTS)
            rows.append(
                {
                    "clip": geometry, "weights": quantize, "variant": way,
                    "peak_gb": (step_bytes(work, modes).total - unused) / 1e9,
                    "host_gb": host_bytes(work) / 1e9, "copied_gb": copies.copied_bytes / 1e9,
                    "copy_s": copies.copy_s, "waits_s": copies.exposed_s,
                }
            )  # fmt: skip
    return rows


def counted_everywhere(device: torch.device, gb_s: object) -> list[dict]:
    """Predictions for this GPU and its rate of copies, or for an RTX 4090 and the assumed rate."""
    gpu = gpu_of(torch.cuda.get_device_name()) if device.type == "cuda" else None
    measured = gpu is not None and isinstance(gb_s, float)
    rate = 1e9 * gb_s if measured else PCIE_BYTES_PER_S
    return [
        row
        for quantize in ("none", "int8")
        for row in counted(gpu or GPUS["RTX 4090"], rate, quantize=quantize)
    ]


def main() -> None:
    parser: argparse.ArgumentParser = figures.phase_options(__doc__)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    tiny = options.tiny or not cuda
    device = torch.device("cuda" if cuda else "cpu")
    clock, results = figures.Clock(options.seconds), figures.Results(options.output)
    results.note(machine=rates.machine(), tiny=tiny)
    results.attempt("copy_gb_s", lambda: copy_gb_s(device, tiny=tiny))
    results.attempt("counted", lambda: counted_everywhere(device, results.values["copy_gb_s"]))
    for geometry in GEOMETRIES[:1] if tiny else GEOMETRIES:
        results.attempt(f"step {geometry}", partial(steps_of, geometry, device, clock, tiny=tiny))
    if isinstance(results.values["counted"], list):
        print(figures.table(results.values["counted"]))


if __name__ == "__main__":
    main()
