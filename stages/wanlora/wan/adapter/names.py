"""How each kind of adapter file names its tensors: one table, read in both directions.

Owns: the four layouts, and the names of Wan's linear modules in diffusers and in the original code.
Knows nothing of files or numbers.

Legend: in a template N stands for the number of a block.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from wanlora.wan.targets import PRESETS

Matrix = Literal["A", "B"]

# diffusers' name and the original Wan code's, as scripts/convert_wan_to_diffusers.py maps them.
# The image rows exist in I2V models only.
ORIGINAL_NAMES: dict[str, str] = {
    **{
        f"blocks.N.{ours}.{name}": f"blocks.N.{theirs}.{short}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for name, short in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    "blocks.N.ffn.net.0.proj": "blocks.N.ffn.0",
    "blocks.N.ffn.net.2": "blocks.N.ffn.2",
    "blocks.N.attn2.add_k_proj": "blocks.N.cross_attn.k_img",
    "blocks.N.attn2.add_v_proj": "blocks.N.cross_attn.v_img",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
BLOCK_LINEARS = tuple(ORIGINAL_NAMES)[:10]
"""The linear modules of a T2V block."""

_BLOCK = re.compile(r"^blocks([._])(\d+)(?=[._])")
_MATRIX = re.compile(r"\.(?:lora_(?P<A>A|down)|lora_(?P<B>B|up))(?:\.default)?\.weight$")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?$")


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of naming tensors.

    Attributes:
        prefix: What every key starts with.
        matrices: What A and B are called.
        names: This layout's name for each of diffusers' templates; empty = the same.
        example: A key, for messages.
    """

    prefix: str
    matrices: Mapping[Matrix, str]
    names: Mapping[str, str]
    example: str

    def written(self, module: str) -> str | None:
        """Name a module of diffusers' as this layout does, prefix included; None = it cannot."""
        name, number = template(module)
        if self.names and name not in self.names:
            return None
        return self.prefix + _numbered(self.names.get(name, name), number)

    def module(self, written: str) -> str | None:
        """Give diffusers' name for what this layout wrote without its prefix; None = unknown."""
        name, number = template(written)
        known = {theirs: ours for ours, theirs in self.names.items()}
        if self.names and name not in known:
            return None
        return _numbered(known.get(name, name), number)


_LORA_AB: dict[Matrix, str] = {"A": "lora_A.weight", "B": "lora_B.weight"}

LAYOUTS: dict[str, Layout] = {
    "diffusers": Layout(
        "transformer.", _LORA_AB, {}, "transformer.blocks.0.attn1.to_q.lora_A.weight"
    ),
    "peft": Layout(
        "base_model.model.", _LORA_AB, {}, "base_model.model.blocks.0.attn1.to_q.lora_A.weight"
    ),
    "comfyui": Layout(
        "diffusion_model.", _LORA_AB, ORIGINAL_NAMES,
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    ),
    "kohya": Layout(
        "lora_unet_", {"A": "lora_down.weight", "B": "lora_up.weight"},
        {module: name.replace(".", "_") for module, name in ORIGINAL_NAMES.items()},
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    ),
}  # fmt: skip


def layout_of(keys: Iterable[str]) -> tuple[str, str] | None:
    """Tell a file's layout by its keys, and the prefix they have.

    The original Wan code's names without a prefix, as some trainers write them, are ComfyUI's.

    Returns:
        The layout's name and the prefix; None when it is none of them.
    """
    keys = list(keys)
    for name, layout in LAYOUTS.items():
        if keys and all(key.startswith(layout.prefix) for key in keys):
            return name, layout.prefix
    bare = [split_key(key) for key in keys]
    if bare and all(part and LAYOUTS["comfyui"].module(part[0]) for part in bare):
        return "comfyui", ""
    return None


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into the module as written and what it holds: A, B, magnitude or alpha."""
    if found := _MATRIX.search(key):
        return key[: found.start()], "A" if found["A"] else "B"
    if found := _MAGNITUDE.search(key):
        return key[: found.start()], "magnitude"
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    return None


def template(name: str) -> tuple[str, str]:
    """Take the block's number out of a name: `blocks.3.x` is (`blocks.N.x`, `3`)."""
    found = _BLOCK.match(name)
    if not found:
        return name, ""
    return f"blocks{found[1]}N{name[found.end() :]}", found[2]


def preset_of(modules: Iterable[str]) -> str | None:
    """Name the preset of targets that these are, on every block from the first; None = none."""
    found = set(modules)
    numbers = {template(module)[1] for module in found} - {""}
    if not numbers or numbers != {str(number) for number in range(len(numbers))}:
        return None
    for name, pattern in PRESETS.items():
        linears = {_numbered(linear, n) for linear in ORIGINAL_NAMES for n in numbers}
        if found == {linear for linear in linears if re.fullmatch(pattern, linear)}:
            return name
    return None


def _numbered(name: str, number: str) -> str:
    return name.replace("N", number, 1) if number else name
