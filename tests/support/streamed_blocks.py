"""Compare streamed blocks with resident ones, compiled, in a process without a type checker.

Prints a JSON object for the compiler backend and the ways of keeping activations that are named on
the command line, with +int8 or +fp8 for 8-bit weights.
"""

import json
import sys
from functools import partial

import torch
from torch._dynamo.utils import counters

from tests.support import real_size
from tests.support.compiled_blocks import clip, furthest
from wanlora.cost.flops import TransformerShape
from wanlora.wan.blocks import set_activations
from wanlora.wan.streaming import stream_blocks

LAYERS = 5
WAYS = {
    "none": ("none",) * LAYERS,
    "selective": ("selective",) * LAYERS,
    "full": ("full",) * LAYERS,
    "offload": ("offload",) * LAYERS,
    "mixed": ("offload", "full", "selective", "none", "none"),
}
SHAPE = TransformerShape(
    num_layers=LAYERS, num_attention_heads=2, attention_head_dim=16, ffn_dim=64, text_dim=32
)
CPU = torch.device("cpu")


def tiny(targets="attention+ffn", dtype=torch.float32, quantize="none"):
    torch.manual_seed(0)
    return real_size.transformer(
        SHAPE, rank=4, targets=targets, device="cpu", dtype=dtype, quantize=quantize
    )


def streamed(num_streamed, **settings):
    model = tiny(**settings)
    stream_blocks(model, num_streamed, device=CPU)
    return model


def gradients(model):
    """Loss and gradients of a training step, and the loss without gradients after it."""
    model.zero_grad()
    loss = real_size.loss(model, clip(model))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        validation = real_size.loss(model, clip(model))
    return {"loss": loss.detach(), "validation": validation, **found}


def measure(way: str) -> dict:
    """Differences of streamed from resident blocks, and the graphs of both, in turn."""
    way, _, quantize = way.partition("+")
    settings = {
        "targets": r".*(attn1.to_q|ffn.net.2)",  # few, so that compiling is fast
        "quantize": quantize or "none",
    }
    resident = tiny(**settings)
    set_activations(resident, WAYS[way], compiled=True)
    expected = gradients(resident)
    graphs, differences = [counters["stats"]["unique_graphs"]], []
    model = streamed(3, **settings)
    set_activations(model, WAYS[way], compiled=True)
    for _ in range(2):
        differences.append(furthest(gradients(model), expected))
        graphs.append(counters["stats"]["unique_graphs"])
    return {"graphs": graphs, "differences": differences}


def main() -> None:
    backend, *ways = sys.argv[1:]
    torch.compile = partial(torch.compile, backend=backend)
    result = {}
    for way in ways:
        torch._dynamo.reset()
        counters.clear()
        result[way] = measure(way)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
