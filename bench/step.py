"""What a training step costs, and how far from the floor it is: `python bench/step.py`.

On a CUDA GPU: Wan 2.1 T2V-1.3B at full size with random weights, every variant on the same inputs
in one process. Elsewhere: a tiny model, which keeps this file alive and measures nothing.

    python bench/step.py --geometry 81x480x832 --geometry 81x480x480 --targets attention
    python bench/step.py --variants fullckpt_cudnn none auto --output step.json

First an attention and a matrix-product microbenchmark on this box: from their rates follows the
floor, the time of a step's FLOPs with nothing recomputed and nothing else done. Then the baselines,
as their authors' defaults run, and ours:

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
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import figures
import models
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from wanlora.adapters import targets
from wanlora.adapters.lora import adapter_parameters
from wanlora.core.buckets import Bucket, latent_shape, num_tokens
from wanlora.cost.flops import TransformerShape, step_flops
from wanlora.cost.gpus import gpu_of
from wanlora.cost.memory import plan, step_bytes
from wanlora.cost.seconds import model_flops
from wanlora.training import fitting, flow
from wanlora.training.batches import MicroBatch
from wanlora.training.masters import Masters
from wanlora.training.predict import predict
from wanlora.training.workload import describe, workload
from wanlora.wan import attention
from wanlora.wan.blocks import set_activations
from wanlora.wan.variants import VARIANTS, Variant

BASELINES = ("seed", "naive", "fullckpt", "fullckpt_cudnn")
OURS = ("eager", "full", "selective", "none", "auto")
RANK = 32


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


def make_case(geometry: str, preset: str, device: torch.device, *, tiny: bool) -> Case:
    frames, height, width = map(int, geometry.split("x"))
    bucket = Bucket(17, 64, 64) if tiny else Bucket(frames, height, width)
    row = VARIANTS["t2v-1.3b"]
    shape = models.TINY if tiny else row.shape
    if tiny:
        row = replace(row, shape=shape)
    generator = torch.Generator().manual_seed(0)
    size = (1, *latent_shape(bucket))
    prompt = torch.zeros(1, 512, shape.text_dim)
    prompt[:, :120] = torch.randn(120, shape.text_dim, generator=generator)
    batch = MicroBatch(
        ("clip",), torch.randn(size, generator=generator), torch.randn(size, generator=generator),
        torch.full((1,), 0.5), torch.ones(1), prompt,
    )  # fmt: skip
    placed = {k: v.to(device) for k, v in batch._asdict().items() if torch.is_tensor(v)}
    dtype = torch.float32 if tiny else torch.bfloat16
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
        with torch.autocast(case.device.type, torch.bfloat16, enabled=not case.tiny):
            prediction, target = predict(model, batch, case.device, case.dtype)
        loss = flow.loss_per_clip(prediction, target).sum()
        torch.autograd.backward(loss)
        return loss.detach()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Step(backward, update, parameters, "default", "full")


def build(name: str, case: Case) -> Step:
    """Make a variant."""
    model = case.transformer()
    if name in BASELINES:
        # torch's defaults, as diffusers' own scripts have them
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        if name in ("fullckpt", "fullckpt_cudnn"):
            asked = "cudnn" if name == "fullckpt_cudnn" and not case.tiny else "default"
            return masters_step(case, model, asked, "full")
        encode = one_stage(case) if name == "seed" else lambda: case.batch
        return autocast_step(case, model, encode)
    compiled = name != "eager" and not case.tiny
    modes = ({"eager": "selective"}.get(name, name),) * case.shape.num_layers
    if name == "auto":
        modes = plan(case.work(compiled=compiled), fitting.budget(case.device))
    set_activations(model, modes, compiled=compiled)
    return masters_step(case, model, "auto", describe(modes))


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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device, times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def free(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(name: str, case: Case, *, warmup: int, steps: int) -> dict:
    """Build a variant, run it, and forget it; running out of memory is a result."""
    free(case.device)
    try:
        step = build(name, case)
        with kernel(step.asked, case.device):
            started = time.perf_counter()
            loss = float(step.backward())
            gradients = {name: p.grad.cpu().clone() for name, p in step.parameters.items()}
            first_step_s = time.perf_counter() - started
            step.update()
            with attention.watched() as operators:
                step()
            timed(step, case.device, warmup)
            if case.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(case.device)
            seconds = timed(step, case.device, steps)
    except torch.OutOfMemoryError as error:
        return {"variant": name, "error": str(error).splitlines()[0]}
    cuda = case.device.type == "cuda"
    return {
        "variant": name,
        "blocks": step.blocks,
        "seconds": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "peak_gb": torch.cuda.max_memory_allocated(case.device) / 1e9 if cuda else None,
        "attention": sorted(operators),
        "first_step_s": first_step_s,
        "loss": loss,
        "gradients": gradients,
    }


def microbenchmarks(case: Case) -> dict:
    """Rates of this box: attention by kernel at the case's length, and a large matrix product."""
    device, dtype, shape = case.device, case.dtype, case.shape
    tokens, size = num_tokens(case.bucket), 256 if case.tiny else 8192
    query = torch.randn(
        1, shape.num_attention_heads, tokens, shape.attention_head_dim, device=device, dtype=dtype,
        requires_grad=True,
    )  # fmt: skip
    product = 2.0 * tokens * tokens * shape.width
    rates = {}
    for name in ("cudnn", "flash", "efficient", "fa3", "fa4", "math") if case.tiny else (
        "cudnn", "flash", "efficient", "fa3", "fa4"
    ):  # fmt: skip
        with contextlib.suppress(Exception), attention.pinned(name, device):
            forward = partial(scaled_dot_product_attention, query, query, query)
            result = forward()
            gradient = torch.ones_like(result)

            def both(forward=forward, gradient=gradient) -> None:
                forward().backward(gradient)

            both()
            forward_s = statistics.median(timed(forward, device, 10))
            both_s = statistics.median(timed(both, device, 10))
            rates[name] = {
                "forward_tflops": 2 * product / forward_s / 1e12,
                "backward_tflops": 5 * product / max(both_s - forward_s, 1e-9) / 1e12,
            }
    left = torch.randn(size, size, device=device, dtype=dtype)
    torch.mm(left, left)
    matmul_s = statistics.median(timed(lambda: torch.mm(left, left), device, 10))
    return {"attention": rates, "matmul_tflops": 2 * size**3 / matmul_s / 1e12}


def floor_seconds(case: Case, micro: dict) -> float:
    """A step's FLOPs at this box's best rates, nothing recomputed."""
    work = case.work(compiled=True)
    step = step_flops(
        case.shape, work.num_tokens, rank=RANK, adapted=work.adapted, recompute="none"
    )
    forward, backward = (
        parts.self_attention + parts.cross_attention for parts in (step.forward, step.backward)
    )
    linear = step.model - forward - backward

    def attention_s(rate: dict) -> float:
        return (forward / rate["forward_tflops"] + backward / rate["backward_tflops"]) / 1e12

    best = min(map(attention_s, micro["attention"].values()))
    return best + linear / micro["matmul_tflops"] / 1e12


def cosine(found: dict, expected: dict) -> float:
    left, right = (
        torch.cat([g[n].flatten().double() for n in sorted(g)]) for g in (found, expected)
    )
    return float(torch.dot(left, right) / left.norm() / right.norm())


def run_case(case: Case, options: argparse.Namespace) -> dict:
    micro = microbenchmarks(case)
    floor = floor_seconds(case, micro)
    rows = []
    for name in options.variants:
        print(f"... {name}", flush=True)
        rows.append(measure(name, case, warmup=options.warmup, steps=options.steps))
    flops = model_flops(case.work(compiled=True))
    gpu = gpu_of(torch.cuda.get_device_name()) if case.device.type == "cuda" else None
    by_name = {row["variant"]: row for row in rows if "seconds" in row}
    reference = by_name.get("fullckpt", next(iter(by_name.values())))["gradients"]
    for row in by_name.values():
        row["tflops"] = flops / row["seconds"] / 1e12
        row["mfu"] = flops / row["seconds"] / gpu.peak_flops if gpu else None
        row["to_floor"] = row["seconds"] / floor
        row["gradient_cosine"] = cosine(row["gradients"], reference)
        for baseline in BASELINES:
            if baseline in by_name:
                row[f"{baseline} takes"] = by_name[baseline]["seconds"] / row["seconds"]
    for row in by_name.values():
        del row["gradients"]
    counted = {
        way: step_bytes(case.work(compiled=True), (way,) * case.shape.num_layers).total / 1e9
        for way in ("none", "selective", "full")
    }
    return {
        "geometry": str(case.bucket), "tokens": num_tokens(case.bucket), "targets": case.targets,
        "tflop": flops / 1e12, "floor_s": floor, "counted_gb": counted, "micro": micro,
        "rows": rows,
    }  # fmt: skip


def machine() -> dict:
    """What figures depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
            found["nvidia_smi"] = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                check=True, capture_output=True, text=True,
            ).stdout.strip()  # fmt: skip
    return found


def shown(result: dict) -> str:
    columns = ("variant", "blocks", "seconds", "min", "max", "peak_gb", "mfu", "to_floor", "loss",
               "gradient_cosine", *(f"{b} takes" for b in BASELINES))  # fmt: skip
    rows = [{c: row.get(c, "") for c in columns} for row in result["rows"] if "seconds" in row]
    failed = [f"{r['variant']}: {r['error']}" for r in result["rows"] if "error" in r]
    head = (
        f"\n{result['geometry']} ({result['tokens']:,} tokens), LoRA r={RANK} on "
        f"{result['targets']}: {result['tflop']:.4g} TFLOP, floor {result['floor_s']:.3g} s"
    )
    ran = [
        f"attention of {row['variant']}: {', '.join(row['attention'])}"
        for row in result["rows"]
        if "seconds" in row
    ]
    return "\n".join([head, figures.table(rows), *failed, *ran])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--geometry", action="append", help="FRAMESxHEIGHTxWIDTH, repeatable")
    parser.add_argument("--targets", action="append", help="attention, attention+ffn; repeatable")
    parser.add_argument("--variants", nargs="+", default=[*BASELINES, *OURS])
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    tiny = not torch.cuda.is_available()
    device = torch.device("cpu" if tiny else "cuda")
    result = {"machine": machine(), "tiny": tiny, "cases": []}
    if tiny:
        print("no CUDA here: a tiny model; these figures mean nothing")
    for geometry in options.geometry or ["81x480x832"]:
        for preset in options.targets or ["attention"]:
            case = make_case(geometry, preset, device, tiny=tiny)
            found = run_case(case, options)
            result["cases"].append(found)
            print(shown(found), flush=True)
            if options.output:  # after every case: a later one may take the machine down
                options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
