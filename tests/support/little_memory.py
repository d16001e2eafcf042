"""Fit a model into an address space that is nearly full, in a process of its own.

    python -m tests.support.little_memory ACTIVATIONS ROOM_MB

Prints the ways chosen, or the refusal.
"""

import logging
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.support import real_size
from wanlora.core.buckets import Bucket
from wanlora.cost.flops import TransformerShape
from wanlora.errors import DeviceError
from wanlora.training import fitting
from wanlora.training.workload import describe, workload
from wanlora.wan.variants import VARIANTS

LAYERS, BUCKET = 16, Bucket(17, 96, 96)
SHAPE = TransformerShape(
    num_layers=LAYERS, num_attention_heads=2, attention_head_dim=16, ffn_dim=65536, text_dim=32
)


def main(activations: str, room_mb: int) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    cpu = torch.device("cpu")
    model = real_size.transformer(SHAPE, rank=2, device="cpu", dtype=torch.float32)
    variant = replace(VARIANTS["micro"], shape=SHAPE)
    work = workload(
        variant, BUCKET, batch_size=1, rank=2, adapted=["blocks.0.attn1.to_q"], compiled=False,
        element_bytes=4,
    )  # fmt: skip
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + room_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        trial = fitting.fit(
            model,
            work,
            BUCKET,
            variant,
            activations=activations,
            kernel="auto",
            device=cpu,
            dtype=torch.float32,
        )
        print("fits:", describe(trial.modes))
    except DeviceError as error:
        print("refused:", error)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
