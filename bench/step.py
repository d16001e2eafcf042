"""What a training step costs, and how far from the floor it is: `python bench/step.py`.

On a CUDA GPU: Wan 2.1 T2V-1.3B at full size with random weights, every variant on the same inputs
in one process. Elsewhere: a tiny model, which keeps this file alive and measures nothing.

    python bench/step.py --geometry 81x480x832 --geometry 81x480x480 --targets attention
    python bench/step.py --variants fullckpt_cudnn none auto --output step.json

First the rates of this box (`rates.py`), from which the floor of a step follows. Then the
baselines, as their authors' defaults run, and ours:

    seed            one stage: VAE and UMT5 in every step, LoRA in fp32 under autocast, full
                    checkpointing, torch's own choice of attention
    naive           the same on cached latents
    fullckpt        cached latents, bf16 LoRA over fp32 masters, full checkpointing, eager
    fullckpt_cudnn  that with cuDNN attention pinned: the honest control
    none selective full auto     ours: compiled, attention pinned, activations as named
    eager           ours, selective, not compiled
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import figures
import models
import rates
import torch
from rates import RANK, timed
from torch.utils.checkpoint import checkpoint

from wanlora.adapters import targets
from wanlora.adapters.lora import adapter_parameters
from wanlora.core.buckets import Bucket, latent_shape, num_tokens
from wanlora.cost.flops import TransformerShape
from wanlora.cost.gpus import gpu_of
from wanlora.cost.memory import plan, step_bytes
from wanlora.cost.seconds import model_flops
from wanlora.training import fitting, flow
from wanlora.training.batches import MicroBatch
from wanlora.training.kernel_check import AttentionShape
from wanlora.training.kernel_probe import kernel_for
from wanlora.training.masters import Masters
from wanlora.training.predict import predict
from wanlora.training.workload import describe, workload
from wanlora.wan import attention
from wanlora.wan.blocks import set_activations
from wanlora.wan.variants import VARIANTS, Variant

BASELINES = ("seed", "naive", "fullckpt", "fullckpt_cudnn")
OURS = ("eager", "full", "selective", "none", "auto")
MIN_STEPS = 3
"""Timed steps of a variant that is cut short by the end of the time."""


@dataclass
class Case:
    """What all variants of one table share."""

    variant: Variant
    shape: TransformerShape
    bucket: Bucket
    targets: str
    device: torch.device
    dtype: torch.dtype
    batch: MicroBatch
    tiny: bool
    kernel: str = "auto"

    @property
    def fused(self) -> bool:
        """True on a GPU, which has fused kernels, a compiler and fast bf16."""
        return self.device.type == "cuda"

    def transformer(self) -> torch.nn.Module:
        return models.transformer(
            self.shape, targets=self.targets, rank=RANK, device=self.device, dtype=self.dtype
        )

    def work(self, *, compiled: bool):
        names = targets.match_targets(targets.linear_names(self.shape.num_layers), self.targets)
        return workload(
            self.variant, self.bucket, batch_size=1, rank=RANK, adapted=names, compiled=compiled,
            element_bytes=self.dtype.itemsize,
        )  # fmt: skip


@dataclass
class Step:
    """A variant, ready to run.

    Attributes:
        backward: Forward and backward pass of one clip; gives its loss.
        update: Clip, step and clear.
        parameters: What is trained, by name, with its gradients between the two.
        asked: The attention kernel: a name of `wanlora.wan.attention`, or default for torch's own
            choice.
        blocks: What they recompute, in words.
    """

    backward: Callable[[], torch.Tensor]
    update: Callable[[], None]
    parameters: dict[str, torch.nn.Parameter]
    asked: str
    blocks: str

    def __call__(self) -> None:
        self.backward()
        self.update()


def make_case(
    geometry: str,
    preset: str,
    device: torch.device,
    *,
    tiny: bool,
    variant: str = "t2v-1.3b",
    num_layers: int | None = None,
) -> Case:
    frames, height, width = map(int, geometry.split("x"))
    bucket = rates.TINY if tiny else Bucket(frames, height, width)
    shape = models.shape_of(variant, num_layers)
    if tiny:
        shape = replace(models.TINY, num_layers=num_layers or models.TINY.num_layers)
    row = replace(VARIANTS[variant], shape=shape)
    generator = torch.Generator().manual_seed(0)
    size = (1, *latent_shape(bucket))
    prompt = torch.zeros(1, 512, shape.text_dim)
    prompt[:, :120] = torch.randn(120, shape.text_dim, generator=generator)
    batch = MicroBatch(
        ("clip",), torch.randn(size, generator=generator), torch.randn(size, generator=generator),
        torch.full((1,), 0.5), torch.ones(1), prompt,
    )  # fmt: skip
    placed = {k: v.to(device) for k, v in batch._asdict().items() if torch.is_tensor(v)}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Case(row, shape, bucket, preset, device, dtype, batch._replace(**placed), tiny)


# --- the steps ---


def masters_step(case: Case, model: torch.nn.Module, asked: str, blocks: str) -> Step:
    """Ours: bf16 adapter in the graph, fp32 masters and gradients; as the loop of `train` does."""
    masters = Masters(adapter_parameters(model))
    optimizer = torch.optim.AdamW(masters.parameters.values(), lr=0.0)

    def backward() -> torch.Tensor:
        prediction, target = predict(model, case.batch, case.device, case.dtype)
        loss = flow.loss_per_clip(prediction, target).sum()
        torch.autograd.backward(loss)
        masters.accumulate()
        return loss.detach()

    def update() -> None:
        masters.clip(1.0)
        optimizer.step()
        masters.zero_grad()
        masters.publish()

    return Step(backward, update, masters.parameters, asked, blocks)


def autocast_step(case: Case, model: torch.nn.Module, encode: Callable[[], MicroBatch]) -> Step:
    """The usual trainer: LoRA in fp32, autocast, one optimizer over it."""
    parameters = adapter_parameters(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0)

    def backward() -> torch.Tensor:
        batch = encode()
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.fused):
            prediction, target = predict(model, batch, case.device, case.dtype)
        loss = flow.loss_per_clip(prediction, target).sum()
        torch.autograd.backward(loss)
        return loss.detach()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Step(backward, update, parameters, "default", "full")


def choose_kernel(case: Case) -> tuple[Case, str]:
    """Let our variants use the kernel that `train` would choose; return the choice in words."""
    shape = AttentionShape(
        num_tokens=num_tokens(case.bucket), other_tokens=frozenset(), batch_size=1,
        num_heads=case.shape.num_attention_heads, head_dim=case.shape.attention_head_dim,
        num_text_tokens=512, dtype=case.dtype, device=case.device,
    )  # fmt: skip
    try:
        choice = kernel_for("auto", shape)
    except Exception as error:  # noqa: BLE001  (no kernel is right: the steps show what follows)
        return case, figures.reason_of(error)
    return replace(case, kernel=choice.name), choice.describe()


def modes_of(name: str, case: Case) -> tuple[str, ...]:
    """Recompute mode of each block, for one of our variants."""
    if name == "auto":
        return plan(case.work(compiled=case.fused), fitting.budget(case.device))
    return ({"eager": "selective"}.get(name, name),) * case.shape.num_layers


def build(name: str, case: Case) -> Step:
    """Make a variant."""
    model = case.transformer()
    if name in BASELINES:
        # torch's defaults, as diffusers' own scripts have them
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        if name in ("fullckpt", "fullckpt_cudnn"):
            asked = "cudnn" if name == "fullckpt_cudnn" and case.fused else "default"
            return masters_step(case, model, asked, "full")
        encode = one_stage(case) if name == "seed" else lambda: case.batch
        return autocast_step(case, model, encode)
    compiled = name != "eager" and case.fused
    modes = modes_of(name, case)
    set_activations(model, modes, compiled=compiled)
    return masters_step(case, model, case.kernel, describe(modes))


def one_stage(case: Case) -> Callable[[], MicroBatch]:
    """Encode the clip and its caption again; decoding the video is left out."""
    vae = models.vae(case.device, tiny=case.tiny)
    encoder = models.text_encoder(case.device, case.dtype, tiny=case.tiny)
    frames = torch.zeros(1, 3, *case.bucket, device=case.device)
    ids = torch.ones(1, 512, dtype=torch.long, device=case.device)

    @torch.no_grad()
    def encode() -> MicroBatch:
        vae.encode(frames).latent_dist.mode()
        encoder(ids, ids)
        return case.batch  # its values, so that losses compare; the work was done

    return encode


# --- measuring ---


@contextlib.contextmanager
def kernel(asked: str, device: torch.device) -> Iterator[None]:
    if asked == "default":
        yield
        return
    with attention.pinned(asked, device):
        yield


def measure(
    name: str,
    case: Case,
    *,
    warmup: int,
    steps: int,
    clock: figures.Clock,
    make: Callable[[], Step] | None = None,
) -> dict:
    """Build a variant, run it, and forget it; running out of memory is a result.

    Args:
        name: Variant.
        case: What all variants share.
        warmup: Steps before the timed ones, of which the first two also give gradients and the
            attention kernels.
        steps: Timed steps; fewer, but `MIN_STEPS`, if the clock runs out.
        clock: The time left.
        make: Builds it; by default `build`.
    """
    rates.free(case.device)
    try:
        step = make() if make else build(name, case)
        with kernel(step.asked, case.device):
            started = time.perf_counter()
            loss = float(step.backward())
            gradients = {name: p.grad.cpu().clone() for name, p in step.parameters.items()}
            first_step_s = time.perf_counter() - started
            step.update()
            with attention.watched() as operators:
                step()
            timed(step, case.device, warmup - 2, clock=clock)
            if case.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(case.device)
            seconds = timed(step, case.device, steps, clock=clock, least=MIN_STEPS)
    except Exception as error:  # noqa: BLE001  (out of memory, a kernel, the compiler)
        return {"variant": name, "error": figures.reason_of(error)}
    return {
        "variant": name,
        "blocks": step.blocks,
        "seconds": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "timed_steps": len(seconds),
        "peak_gb": rates.peak_gb(case.device),
        "attention": sorted(operators),
        "first_step_s": first_step_s,
        "loss": loss,
        "gradients": gradients,
    }


def cosine(found: dict, expected: dict) -> float:
    left, right = (
        torch.cat([g[n].flatten().double() for n in sorted(g)]) for g in (found, expected)
    )
    return float(torch.dot(left, right) / left.norm() / right.norm())


def micro_of(case: Case, measured: dict) -> dict:
    """Rates at the case's length: those of an earlier run of rates.py, or measured here."""
    found = rates.micro_of(measured, case.bucket)
    if found and case.shape.attention_head_dim == models.shape_of("t2v-1.3b").attention_head_dim:
        return found
    tokens = num_tokens(case.bucket)
    return {
        "attention": rates.attention_rates(
            tokens, case.shape, case.device, case.dtype, tiny=case.tiny
        ),
        "matmul_tflops": rates.matmul_tflops(case.device, case.dtype, tiny=case.tiny),
    }


def derive(rows: list[dict], gradients: dict[str, dict], case: Case, floor: float | None) -> None:
    """Add to each row what follows from the others: ratios, and the agreement of gradients."""
    flops = model_flops(case.work(compiled=True))
    gpu = gpu_of(torch.cuda.get_device_name()) if case.device.type == "cuda" else None
    by_name = {row["variant"]: row for row in rows if "seconds" in row}
    reference = gradients.get("fullckpt") or next(iter(gradients.values()), None)
    for name, row in by_name.items():
        row["tflops"] = flops / row["seconds"] / 1e12
        row["mfu"] = flops / row["seconds"] / gpu.peak_flops if gpu else None
        row["to_floor"] = row["seconds"] / floor if floor else None
        if name in gradients:
            row["gradient_cosine"] = cosine(gradients[name], reference)
        for baseline in BASELINES:
            if baseline in by_name:
                row[f"{baseline} takes"] = by_name[baseline]["seconds"] / row["seconds"]


def same_as_auto(case: Case, rows: list[dict]) -> dict | None:
    """Row of a variant with the modes that `auto` chooses here, if it was measured."""
    modes = modes_of("auto", case)
    for row in rows:
        name = row["variant"]
        if name in OURS[1:-1] and "seconds" in row and modes_of(name, case) == modes:
            return row | {"variant": "auto", "same_as": name}
    return None


def run_case(
    case: Case, options: argparse.Namespace, clock: figures.Clock, measured: dict, note: Callable
) -> None:
    """Measure the variants of a case; `note` gets its figures after each of them."""
    work = case.work(compiled=True)
    case, kernel_choice = choose_kernel(case)
    try:
        micro = micro_of(case, measured)
        floor = rates.floor_seconds(case.shape, work.num_tokens, work.adapted, micro)
    except Exception as error:  # noqa: BLE001  (no kernel runs here)
        micro, floor = {"error": figures.reason_of(error)}, None
    result = {
        "geometry": str(case.bucket), "tokens": work.num_tokens, "targets": case.targets,
        "tflop": model_flops(work) / 1e12, "floor_s": floor,
        "counted_gb": {
            way: step_bytes(work, (way,) * case.shape.num_layers).total / 1e9
            for way in ("none", "selective", "full")
        },
        "kernel": kernel_choice, "micro": micro, "rows": [],
    }  # fmt: skip
    rows, gradients = result["rows"], {}
    for name in options.variants:
        print(f"... {result['geometry']} {name}, {clock.left_s:.0f} s left", flush=True)
        ours = name in OURS
        row = same_as_auto(case, rows) if name == "auto" else None
        if row is None and clock.left_s <= 0:
            row = {"variant": name, "error": "not measured: no time was left"}
        if row is None:
            row = measure(
                name, case, warmup=options.warmup if ours else min(2, options.warmup),
                steps=options.steps if ours else options.baseline_steps, clock=clock,
            )  # fmt: skip
        if "gradients" in row:
            gradients[name] = row.pop("gradients")
        rows.append(row)
        derive(rows, gradients, case, floor)
        note(result)


def shown(result: dict) -> str:
    columns = ("variant", "blocks", "seconds", "min", "max", "peak_gb", "mfu", "to_floor", "loss",
               "gradient_cosine", *(f"{b} takes" for b in BASELINES))  # fmt: skip
    rows = [{c: row.get(c, "") for c in columns} for row in result["rows"] if "seconds" in row]
    failed = [f"{r['variant']}: {r['error']}" for r in result["rows"] if "error" in r]
    floor = f"{result['floor_s']:.3g} s" if result["floor_s"] else "unknown"
    head = (
        f"\n{result['geometry']} ({result['tokens']:,} tokens), LoRA r={RANK} on "
        f"{result['targets']}: {result['tflop']:.4g} TFLOP, floor {floor}"
    )
    ran = [
        f"attention of {row['variant']}: {', '.join(row['attention'])}"
        for row in result["rows"]
        if "seconds" in row
    ]
    return "\n".join([head, *([figures.table(rows)] if rows else []), *failed, *ran])


COST_OF_STARTING = 200.0
"""TFLOP that compiling a case and building its models are counted as, when cases share the time."""


def main() -> None:
    parser = figures.phase_options(__doc__)
    parser.add_argument("--geometry", action="append", help="FRAMESxHEIGHTxWIDTH, repeatable")
    parser.add_argument("--targets", action="append", help="attention, attention+ffn; repeatable")
    parser.add_argument("--variants", nargs="+", default=[*BASELINES, *OURS])
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--baseline-steps", type=int, help="timed steps of baselines: as --steps")
    parser.add_argument("--rates", type=Path, help="output of rates.py: not measured again")
    options = parser.parse_args()
    options.baseline_steps = options.baseline_steps or options.steps
    cuda = torch.cuda.is_available()
    tiny = options.tiny or not cuda
    device = torch.device("cuda" if cuda else "cpu")
    measured = {}
    if options.rates and options.rates.exists():
        measured = json.loads(options.rates.read_text())
    if tiny:
        print("a tiny model: these figures mean nothing")
    cases = [
        make_case(geometry, preset, device, tiny=tiny)
        for geometry in options.geometry or ["81x480x832"]
        for preset in options.targets or ["attention"]
    ]
    results, clock = figures.Results(options.output), figures.Clock(options.seconds)
    finished: list[dict] = []
    results.note(machine=rates.machine(), tiny=tiny, cases=finished)
    costs = [model_flops(case.work(compiled=True)) / 1e12 + COST_OF_STARTING for case in cases]
    for number, case in enumerate(cases):
        share = costs[number] / sum(costs[number:])

        def note(found: dict) -> None:
            results.note(cases=[*finished, found])

        run_case(case, options, figures.Clock(share * clock.left_s), measured, note)
        finished.append(results.values["cases"][-1])
        print(shown(finished[-1]), flush=True)


if __name__ == "__main__":
    main()
