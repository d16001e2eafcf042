"""Four steps as `train` takes them; on a GPU torch raises where the host waits, from the third on.

    python -m tests.support.steps_without_waiting DEVICE

Prints, for eager blocks and on a GPU for compiled ones, the steps whose figures had arrived after
the last one, and whether all figures are finite.
"""

import json
import sys
import warnings

import torch

from tests.support import real_size
from wanlora.adapters.lora import adapter_parameters
from wanlora.core.buckets import Bucket
from wanlora.cost.flops import TransformerShape
from wanlora.training import flow
from wanlora.training.masters import Masters
from wanlora.training.outcomes import Outcomes
from wanlora.training.predict import predict
from wanlora.training.trial import random_batch
from wanlora.wan.attention import pinned
from wanlora.wan.blocks import set_activations

LAYERS, STEPS, WARM = 2, 4, 2
SIZES = {
    "cuda": (Bucket(17, 240, 416), real_size.shape_of("t2v-1.3b", num_layers=LAYERS)),
    "cpu": (
        Bucket(5, 32, 32),
        TransformerShape(
            num_layers=LAYERS, num_attention_heads=2, attention_head_dim=32, ffn_dim=64, text_dim=32
        ),
    ),
}


def take_steps(device: torch.device, *, compiled: bool) -> dict:
    bucket, shape = SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = real_size.transformer(shape, targets="attention", device=device, dtype=dtype)
    set_activations(transformer, ("selective",) * LAYERS, compiled=compiled)
    masters, outcomes = Masters(adapter_parameters(transformer)), Outcomes(device, 1)
    optimizer = torch.optim.AdamW(masters.parameters.values(), lr=1e-4)
    on_host = random_batch(bucket, 1, num_channels=16, text_shape=(512, shape.text_dim))
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    arrived = []
    for step in range(STEPS):
        if step == WARM and device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        outcomes.start()
        given = on_host.upload(stream).wait() if stream else on_host
        prediction, target = predict(transformer, given, device, dtype)
        losses = flow.loss_per_clip(prediction, target) * given.weights
        torch.autograd.backward(losses.sum())
        masters.accumulate()
        values = outcomes.gather(losses.detach(), masters.clip(1.0), None)
        masters.clear_gradient_if(~torch.isfinite(values).all())
        optimizer.step()
        masters.zero_grad()
        masters.publish()
        outcomes.note(step, values, learning_rate=1e-4, waited_s=0.0)
        arrived = outcomes.arrived(all_of_them=False)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    last = outcomes.arrived(all_of_them=True)
    return {
        "arrived": [outcome.step for outcome in arrived],
        "finite": all(outcome.is_finite for outcome in (*arrived, *last)),
    }


def main(device: torch.device) -> None:
    warnings.simplefilter("ignore")
    ways = {"eager": False} | ({"compiled": True} if device.type == "cuda" else {})
    with pinned("auto", device):
        print(json.dumps({way: take_steps(device, compiled=on) for way, on in ways.items()}))


if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
