"""Adapters for tests: random ones, and files written by hand as other tools write them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

from wanlora.adapters.names import BLOCK_LINEARS

IN, OUT, RANK = 16, 24, 4
BLOCKS = 2
ATTENTION = tuple(name for name in BLOCK_LINEARS if "attn" in name)

# Written out from the released files, not from the project's own table.
ORIGINAL = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}  # fmt: skip


def modules(names: Iterable[str] = BLOCK_LINEARS, blocks: int = BLOCKS) -> list[str]:
    return [name.replace("N", str(block)) for block in range(blocks) for name in names]


def original(module: str) -> str:
    """Name a block's module as the original Wan code does."""
    _, block, kind = module.split(".", 2)
    return f"blocks.{block}.{ORIGINAL[kind]}"


def pairs(names: Iterable[str], rank: int = RANK, seed: int = 0) -> dict:
    """Random A `rank in` and B `out rank` for each module."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, IN, generator=draw), torch.randn(OUT, rank, generator=draw))
        for name in names
    }


def tensors_of(found: dict) -> dict[str, torch.Tensor]:
    """Name pairs as `save_adapter` wants them."""
    named = {f"{module}.lora_A.weight": a for module, (a, _) in found.items()}
    return named | {f"{module}.lora_B.weight": b for module, (_, b) in found.items()}


def write(path: Path, tensors: dict[str, torch.Tensor], header: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, header)
    return path


def updates_by_diffusers(file: Path) -> dict[str, torch.Tensor]:
    """Each module's B A as diffusers' own converter gives it: it leaves a scale of 1."""
    state = WanPipeline.lora_state_dict(str(file.parent), weight_name=file.name)
    names = {key.removeprefix("transformer.").partition(".lora_")[0] for key in state}
    return {
        name: state[f"transformer.{name}.lora_B.weight"].double()
        @ state[f"transformer.{name}.lora_A.weight"].double()
        for name in names
    }


def released_transformer() -> WanTransformer3DModel:
    """T2V-1.3B's modules without their weights."""
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_layers=30, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960,
            text_dim=4096,
        )  # fmt: skip
