"""Rates of this box, and the floor of a step that follows from them: `python bench/rates.py`.

Attention forward and backward by kernel at the lengths of a step (12 heads of 128, bf16, one clip),
a large matrix product, and a copy within the device's memory. The floor is the time of a step's
FLOPs at the best of these rates, with nothing recomputed and nothing else done. On a CPU a tiny
length keeps this file alive and measures nothing.
"""

import contextlib
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection
from functools import partial

import figures
import models
import torch
from torch.nn.functional import scaled_dot_product_attention

from wanlora.adapters import targets
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.flops import TransformerShape, step_flops
from wanlora.wan import attention

GEOMETRIES = (Bucket(81, 480, 832), Bucket(81, 480, 480))
TINY = Bucket(17, 64, 64)
KERNELS = ("cudnn", "flash", "efficient", "fa3", "fa4")
RANK = 32
REPEATS = 10


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Forget compiled code, free the memory of what is no longer used, and restart the peak."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def timed(
    action: Callable[[], object], device: torch.device, times: int, *, clock=None, least: int = 1
) -> list[float]:
    """Seconds of each call; with a clock, fewer calls (but `least`) when the time is over."""
    seconds = []
    for _ in range(times):
        if clock and clock.left_s < 0 and len(seconds) >= least:
            break
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def machine() -> dict:
    """Machine and library versions that the figures depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "transformers", "peft", "accelerate", "triton", "zarr", "av"):
        with contextlib.suppress(ImportError):
            from importlib.metadata import version  # noqa: PLC0415

            found[name] = version(name)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": torch.cuda.get_device_name(), "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
            found["nvidia_smi"] = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                check=True, capture_output=True, text=True,
            ).stdout.strip()  # fmt: skip
    return found


def attention_rate(
    kernel: str, tokens: int, shape: TransformerShape, device: torch.device, dtype: torch.dtype
) -> dict:
    """TFLOP/s of one kernel in either pass, on random values."""
    query, key, value = (
        torch.randn(
            1, shape.num_attention_heads, tokens, shape.attention_head_dim, device=device,
            dtype=dtype, requires_grad=True,
        )
        for _ in range(3)
    )  # fmt: skip
    product = 2.0 * tokens * tokens * shape.width
    with attention.pinned(kernel, device):
        forward = partial(scaled_dot_product_attention, query, key, value)
        gradient = torch.randn_like(forward())

        def both() -> None:
            torch.autograd.grad(forward(), (query, key, value), gradient)

        with attention.watched() as operators:
            both()
        if attention.is_other(kernel, operators):
            raise RuntimeError(f"{', '.join(sorted(operators))} ran instead of {kernel}")
        timed(both, device, 2)
        forward_s = statistics.median(timed(forward, device, REPEATS))
        both_s = statistics.median(timed(both, device, REPEATS))
    return {
        "forward_tflops": 2 * product / forward_s / 1e12,
        "backward_tflops": 5 * product / max(both_s - forward_s, 1e-9) / 1e12,
    }


def attention_rates(
    tokens: int, shape: TransformerShape, device: torch.device, dtype: torch.dtype, *, tiny: bool
) -> dict[str, dict]:
    """Rates of each kernel; a kernel that does not run here has its error instead."""
    rates: dict[str, dict] = {}
    for kernel in (*KERNELS, "math") if tiny else KERNELS:
        try:
            rates[kernel] = attention_rate(kernel, tokens, shape, device, dtype)
        except Exception as error:  # noqa: BLE001  (a missing package, an old torch, a kernel)
            rates[kernel] = {"error": figures.reason_of(error)}
    return rates


def matmul_tflops(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> float:
    size = 256 if tiny else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timed(lambda: torch.mm(left, right), device, 3)
    seconds = statistics.median(timed(lambda: torch.mm(left, right), device, REPEATS))
    return 2 * size**3 / seconds / 1e12


def copy_tb_s(device: torch.device, *, tiny: bool) -> float:
    """TB/s of a copy within the memory, bytes read and bytes written."""
    source = torch.empty(2**20 if tiny else 2**31, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timed(lambda: target.copy_(source), device, 3)
    seconds = statistics.median(timed(lambda: target.copy_(source), device, REPEATS))
    return 2 * source.numel() / seconds / 1e12


def floor_seconds(
    shape: TransformerShape, tokens: int, adapted: Collection[str], micro: dict
) -> float:
    """Seconds of a step's FLOPs at this box's best rates, nothing recomputed.

    Args:
        shape: Configuration of the transformer.
        tokens: Tokens of a clip.
        adapted: Names of the adapted linear layers.
        micro: `attention` and `matmul_tflops`, as measured here.
    """
    step = step_flops(shape, tokens, rank=RANK, adapted=frozenset(adapted), recompute="none")
    forward, backward = (
        parts.self_attention + parts.cross_attention for parts in (step.forward, step.backward)
    )
    linear = step.model - forward - backward
    best = min(
        (forward / rate["forward_tflops"] + backward / rate["backward_tflops"]) / 1e12
        for rate in micro["attention"].values()
        if "error" not in rate
    )
    return best + linear / micro["matmul_tflops"] / 1e12


def micro_of(results: dict, bucket: Bucket) -> dict | None:
    """Find the rates of a bucket in this script's results; None if they were not measured."""
    rates = results.get(f"attention {bucket}", {})
    if "error" in rates or not any("error" not in rate for rate in rates.values()):
        return None
    if not isinstance(results.get("matmul_tflops"), float):
        return None
    return {"attention": rates, "matmul_tflops": results["matmul_tflops"]}


def main() -> None:
    options = figures.phase_options(__doc__).parse_args()
    tiny = options.tiny or not torch.cuda.is_available()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if tiny else torch.bfloat16
    shape = models.TINY if tiny else models.shape_of("t2v-1.3b")
    adapted = targets.match_targets(targets.linear_names(shape.num_layers), "attention")
    results = figures.Results(options.output)
    results.note(machine=machine(), tiny=tiny)
    results.attempt("matmul_tflops", partial(matmul_tflops, device, dtype, tiny=tiny))
    results.attempt("copy_tb_s", partial(copy_tb_s, device, tiny=tiny))
    for bucket in (TINY,) if tiny else GEOMETRIES:
        tokens = num_tokens(bucket)
        measured = partial(attention_rates, tokens, shape, device, dtype, tiny=tiny)
        results.attempt(f"attention {bucket}", measured)
        if micro := micro_of(results.values, bucket):
            results.attempt(
                f"floor_s {bucket}", partial(floor_seconds, shape, tokens, adapted, micro)
            )


if __name__ == "__main__":
    main()
