"""Peak memory of a compiled step of four real blocks, counted and measured, on a GPU.

python -m tests.support.counted_peak cuda MODE
"""

import json
import sys
from dataclasses import replace

import torch

from tests.support import real_size
from wanlora.adapters.lora import adapter_parameters
from wanlora.core.buckets import Bucket
from wanlora.cost.memory import step_bytes
from wanlora.training.fitting import fit
from wanlora.training.kernel_check import AttentionShape
from wanlora.training.kernel_probe import kernel_for
from wanlora.training.workload import workload
from wanlora.wan.variants import VARIANTS

LAYERS, BUCKET = 4, Bucket(81, 480, 832)


def peaks(device: torch.device, mode: str) -> dict:
    shape, variant = real_size.shape_of("t2v-1.3b", num_layers=LAYERS), VARIANTS["t2v-1.3b"]
    transformer = real_size.transformer(shape, targets="attention", device=device)
    names = {name.partition(".lora_")[0] for name in adapter_parameters(transformer)}
    work = workload(
        variant, BUCKET, batch_size=1, rank=32, adapted=names, compiled=True, element_bytes=2
    )
    work = replace(work, shape=shape)
    attention = AttentionShape(
        num_tokens=work.num_tokens, other_tokens=frozenset(), batch_size=1,
        num_heads=shape.num_attention_heads, head_dim=shape.attention_head_dim,
        num_text_tokens=512, dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    trial = fit(
        transformer, work, BUCKET, variant, activations=mode,
        kernel=kernel_for("auto", attention).name, device=device, dtype=torch.bfloat16,
    )  # fmt: skip
    counted = step_bytes(replace(work, num_uploaded=1), trial.modes)
    # Masters and moments are not here.
    expected = counted.weights + counted.kept + counted.working
    return {"counted": expected, "measured": trial.peak_bytes}


if __name__ == "__main__":
    where = torch.device(sys.argv[1])
    print(json.dumps({mode: peaks(where, mode) for mode in sys.argv[2:]}))
