"""Train with resident and with streamed blocks on a device, and list the tensors that differ.

As a program: compiled, in a process without a type checker, printing a JSON object.
"""

import json
import sys
from dataclasses import replace

import torch

from bench.models import transformer
from tests.support import real_size
from wanlora.cost.flops import TransformerShape
from wanlora.wan.attention import pinned
from wanlora.wan.blocks import set_activations
from wanlora.wan.streaming import stream_blocks

SHAPE = TransformerShape(
    num_layers=6, num_attention_heads=4, attention_head_dim=64, ffn_dim=4096, text_dim=64
)
SMALL = replace(SHAPE, num_layers=3, attention_head_dim=16, ffn_dim=128)
"""Of a CPU, whose copies are done when they are needed."""
SIZES = {"short clips": (1, 32, 32), "long clips": (17, 64, 96)}
MODES = ("none", "selective", "full", "offload")


def model(device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = SHAPE if device.type == "cuda" else SMALL
    return transformer(shape, targets="attention+ffn", rank=8, device=device, dtype=dtype)


def train(net, size, steps):
    """Losses, and adapter after steps whose gradients change it."""
    losses = []
    for _ in range(steps):
        loss = real_size.loss(net, real_size.inputs(net, *size))
        loss.backward()
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.data -= parameter.grad
                parameter.grad = None
        losses.append(loss.detach())
    adapter = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    return {"losses": torch.stack(losses), **adapter}


def compare(device, length, steps, *, compiled=False):
    """Names of the tensors that differ, by mode. The unfused attention kernel repeats its bits."""
    found = {}
    for mode in MODES:
        results = []
        for streams in (False, True):
            net = model(device)
            stream_blocks(net, streams * len(net.blocks), device=device)
            set_activations(net, (mode,) * len(net.blocks), compiled=compiled)
            with pinned("math", device):
                results.append(train(net, SIZES[length], steps))
        resident, streamed = results
        found[mode] = [n for n in resident if not torch.equal(resident[n], streamed[n])]
    return found


if __name__ == "__main__":
    print(json.dumps(compare(torch.device(sys.argv[1]), "long clips", 5, compiled=True)))
