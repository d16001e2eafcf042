"""Compile blocks in a process of its own, where no type checker is wrapped around functions.

Prints a JSON object for the way of keeping activations and the attention kernel that are named on
the command line.
"""

import json
import sys

import torch
from torch._dynamo.utils import counters

from tests.support import real_size
from wanlora.cost.flops import TransformerShape
from wanlora.wan.attention import pinned
from wanlora.wan.blocks import set_activations

LAYERS = 3
WAYS = {
    "none": ("none",) * LAYERS,
    "selective": ("selective",) * LAYERS,
    "full": ("full",) * LAYERS,
    "mixed": ("full", "selective", "none"),
}


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    shape = TransformerShape(
        num_layers=LAYERS, num_attention_heads=2, attention_head_dim=32, ffn_dim=128, text_dim=32
    )
    return real_size.transformer(shape, rank=4, targets="attention+ffn", device="cpu", dtype=dtype)


def clip(model, num_frames=9):
    values = real_size.inputs(model, num_frames, 32, 48)
    latents = values["hidden_states"]
    values["hidden_states"] = torch.linspace(-1, 1, latents.numel()).view_as(latents).to(latents)
    return values


def gradients(model, num_frames=9):
    for parameter in model.parameters():
        parameter.grad = None
    loss = real_size.loss(model, clip(model, num_frames))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert found
    return {"loss": loss.detach(), **found}


def furthest(found, expected) -> float:
    """Largest difference; NaN if there is a NaN."""
    each = [(found[name] - expected[name]).abs().max() for name in expected]
    return float(torch.stack(each).max())


def validate(model):
    with torch.no_grad():
        real_size.loss(model, clip(model))
        model.disable_adapters()
        real_size.loss(model, clip(model))
        model.enable_adapters()


def measure(way: str) -> dict:
    model = tiny()
    expected = gradients(model)
    set_activations(model, WAYS[way], compiled=True)
    first = furthest(gradients(model), expected)
    graphs = [counters["stats"]["unique_graphs"]]
    for parameter in model.parameters():  # as an optimizer does
        parameter.data.add_(0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        second = furthest(gradients(model), expected)
    attention = {
        event.key.removeprefix("aten::"): event.count
        for event in profile.key_averages()
        if event.key.startswith("aten::_scaled_dot_product") and "backward" not in event.key
    }
    graphs.append(counters["stats"]["unique_graphs"])
    for _ in range(2 if way == "mixed" else 0):
        validate(model)
        gradients(model, num_frames=5)
        graphs.append(counters["stats"]["unique_graphs"])
    return {
        "way": way, "difference": max(first, second), "graphs": graphs,
        "breaks": sum(counters["graph_break"].values()), "attention": attention,
    }  # fmt: skip


if __name__ == "__main__":
    with pinned(sys.argv[2], torch.device("cpu")):
        print(json.dumps(measure(sys.argv[1])))
