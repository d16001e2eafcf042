"""What several processes send each other in a step, and how long that takes here.

    torchrun --nproc_per_node 2 bench/processes.py

Sums flat fp32 gradients of the size of real adapters over the processes, and takes a step of the
micro model beside its own. On GPUs it is NCCL that is measured, elsewhere gloo on loopback, whose
seconds say nothing of a cluster; the bytes are the same.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from wanlora.adapters.file import LoraShape
from wanlora.adapters.lora import add_adapter
from wanlora.core.buckets import Bucket
from wanlora.cost.seconds import all_reduce_bytes
from wanlora.training.distributed import Ranks, select_own_gpu
from wanlora.training.masters import Masters
from wanlora.training.predict import predict
from wanlora.training.trial import random_batch
from wanlora.wan.model_folder import TRANSFORMER, resolve
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import VARIANTS

ADAPTERS = {"1.3B, rank 32, attention": 23_592_960, "1.3B, rank 32, attention+ffn": 43_745_280}
REPEATS = 10


def seconds_of(action: Callable[[], None], ranks: Ranks) -> float:
    times = []
    for _ in range(REPEATS):
        ranks.barrier()
        started = time.perf_counter()
        action()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times)


def micro_step(ranks: Ranks) -> tuple[Masters, Callable[[], None]]:
    """A micro-batch of the micro model at 17x96x160 px, forward and backward."""
    dtype, variant = torch.float32, VARIANTS["micro"]
    model = load_transformer(resolve("micro", TRANSFORMER), dtype=dtype, device=ranks.device)
    masters = Masters(add_adapter(model, LoraShape(rank=32, alpha=32), seed=0))
    text_shape = (variant.shape.num_text_tokens, variant.shape.text_dim)
    batch = random_batch(
        Bucket(17, 96, 160), 1, num_channels=variant.vae.z_dim, text_shape=text_shape
    )

    def step() -> None:
        prediction, target = predict(model, batch, ranks.device, dtype)
        torch.autograd.backward((prediction - target).square().mean())
        masters.accumulate()

    return masters, step


def main() -> None:
    select_own_gpu()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = Ranks(device, timeout_s=600)
    masters, step = micro_step(ranks)
    adapters = {
        name: Masters({name: torch.nn.Parameter(torch.zeros(size, device=ranks.device))})
        for name, size in ADAPTERS.items()
    } | {"micro": masters}
    lines = ["values      MB sent by each  ms      GB/s  of"]
    seconds = {}
    for name, masters in adapters.items():
        size = masters.flat_gradient.numel()
        sent, took = all_reduce_bytes(size, ranks.count), seconds_of(masters.sum_over_ranks, ranks)
        seconds[name] = took
        lines.append(
            f"{size:10,}  {sent / 1e6:15.1f}  {1e3 * took:6.2f}  {sent / took / 1e9:.2f}  {name}"
        )
    step()
    alone, meeting = seconds_of(step, ranks), seconds_of(ranks.barrier, ranks)
    lines.append(
        f"a step of the micro model {1e3 * alone:.0f} ms: its sum takes "
        f"{100 * seconds['micro'] / alone:.1f} % of that, the hosts' meeting {1e3 * meeting:.2f} ms"
    )
    if ranks.is_main:
        print(f"{ranks.count} processes on {ranks.device.type}")
        print("\n".join(lines))
    ranks.barrier()
    ranks.close()


if __name__ == "__main__":
    main()
