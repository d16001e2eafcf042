"""Names of an adapter's tensors: one table of modules, for every trainer's prefix and separator.

Owns: the names of Wan's linear modules in diffusers and in the original code, reading a key under
either, and the four layouts that `export` writes. Must not know: files or numbers.

Legend: in a template, N is the number of a block.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from wanlora.adapters.targets import IMAGE_PRESETS, PRESETS
from wanlora.wan.variants import Expert

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
"""The linear modules of a block."""
IMAGE_LINEARS = tuple(ORIGINAL_NAMES)[10:12]
"""More of them in a model that reads the embeddings of an image (Wan2.1's I2V)."""

_BLOCK = re.compile(r"^blocks([._])(\d+)(?=[._])")
_MATRIX = re.compile(
    r"\.(?:lora_(?P<A>A|down)|lora_(?P<B>B|up)|lora\.(?:(?P<down>down)|(?P<up>up)))"
    r"(?:\.[\w-]+)?\.weight$"
)
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(?:\.[\w-]+)?$")

# Both names of every module with "_" for ".": kohya's trainers and LyCORIS write them so.
_FLAT = {
    name.replace(".", "_"): ours
    for ours, theirs in ORIGINAL_NAMES.items()
    for name in (ours, theirs)
}
_MODULE = re.compile(
    r"(?P<prefix>|.*?_)(?P<name>"
    + "|".join(re.escape(flat).replace("N", r"\d+", 1) for flat in _FLAT)
    + ")"
)

# Words that trainers put before a module's name: transformer., base_model.model., pipe.dit.,
# model.diffusion_model., lora_unet_, lycoris_, ... Any other word may name another part of a model.
_PREFIX_WORDS = frozenset(
    {
        "base", "default", "diffusion", "dit", "lora", "lycoris", "mod", "model", "module",
        "network", "orig", "pipe", "pipeline", "transformer", "unet", "wan",
    }
)  # fmt: skip
# Names of one of two transformers: transformer_2. of diffusers, diffusion_model.transformer_1. of
# ai-toolkit, pipe.dit2. of DiffSynth, low_noise_model. of the original Wan2.2 code.
_EXPERT = re.compile(
    r"(?P<high>transformer[._]?1(?![0-9A-Za-z])|high[._]noise)"
    r"|(?P<low>(?:transformer|dit|model|unet)[._]?2(?![0-9A-Za-z])|low[._]noise)"
)

# The end of a key, and what it holds; the first match counts.
_NOT_LORA = (
    (r"\.lokr_\w+$", "LoKr factors, a Kronecker product"),
    (r"\.hada_\w+$", "LoHa factors, a Hadamard product"),
    (r"\.(?:oft|boft)_\w+$|\.oft_R\.", "an orthogonal transform (OFT)"),
    (r"\.dora_scale$", "DoRA magnitudes in LyCORIS' form, which readers divide by different norms"),
    (
        r"\.diff(?:_[bm])?$",
        "a full-rank change of whole weights, norms, biases or modulation, as in "
        "lightx2v's distilled models; their plain LoRA files have no such keys",
    ),
    (r"\.(?:bias|set_weight)$", "trained biases, norms or whole weights"),
    (r"\.lora_mid\.|\.lora_[AB]\.(?:[\w-]+\.)?weight_scale$", "more than two matrices"),
    (r"\.(?:lora_embedding|modules_to_save)", "whole trained modules"),
)


@dataclass(frozen=True, slots=True)
class Key:
    """The parts of a tensor's key.

    Attributes:
        module: diffusers' name of the module, without a prefix.
        part: Kind of tensor: A, B, magnitude or alpha.
        prefix: Text before the module's name.
        original: True if the module has its name of the original Wan code.
        flat: True if "_" separates the parts of the name.
        expert: Transformer that the prefix names; None if it names no number.
    """

    module: str
    part: str
    prefix: str
    original: bool
    flat: bool
    expert: Expert | None


def read_key(key: str) -> Key | str:
    """Parse the key of any trainer; return the reason if it cannot be used."""
    if (split := _split(key)) is None:
        reasons = (text for pattern, text in _NOT_LORA if re.search(pattern, key))
        return next(reasons, "neither a LoRA matrix nor an alpha")
    written, part = split
    found = _MODULE.fullmatch(written.replace(".", "_"))
    prefix = written[: found.start("name")] if found else written
    if not found:
        return f"no linear module of Wan; the nearest known name is {_nearest(written)}"
    named = _EXPERT.search(prefix)
    words = prefix.replace(named[0], ".") if named else prefix
    if strange := set(filter(None, re.split("[._]+", words))) - _PREFIX_WORDS:
        return f"the prefix {prefix} ({', '.join(sorted(strange))} may be another part of a model)"
    number = re.match(r"blocks_(\d+)_", found["name"])
    flat = found["name"].replace(number[0], "blocks_N_", 1) if number else found["name"]
    ours = _FLAT[flat]
    return Key(
        module=_numbered(ours, number[1] if number else ""),
        part=part,
        prefix=prefix,
        original=flat != ours.replace(".", "_"),
        flat="." not in written[len(prefix) :] and flat != "proj_out",
        expert=None if named is None else "high" if named["high"] else "low",
    )


def layout_of(keys: Iterable[Key]) -> str:
    """Name the layout of `LAYOUTS` that a file's keys are closest to."""
    keys = list(keys)
    if any(key.flat for key in keys):
        return "kohya"
    if any(key.prefix.startswith(LAYOUTS["peft"].prefix) for key in keys):
        return "peft"
    return "comfyui" if any(key.original for key in keys) else "diffusers"


def names_in_file(keys: Iterable[Key]) -> dict[str, str]:
    """Map each module to its name in a file, with dots; empty if all have diffusers' names."""
    keys, found = list(keys), {}
    for key in keys:
        name, number = template(key.module)
        found[key.module] = _numbered(ORIGINAL_NAMES[name], number) if key.original else key.module
    return found if any(key.original for key in keys) else {}


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of naming tensors.

    Attributes:
        prefix: First part of every key.
        matrices: Names of A and B.
        names: This layout's name for each of diffusers' templates; empty = the same.
        example: A key, for messages.
    """

    prefix: str
    matrices: Mapping[Matrix, str]
    names: Mapping[str, str]
    example: str

    def written(self, module: str) -> str | None:
        """Name a module of diffusers' in this layout, with its prefix; None = it has no name."""
        name, number = template(module)
        if self.names and name not in self.names:
            return None
        return self.prefix + _numbered(self.names.get(name, name), number)


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


def _split(key: str) -> tuple[str, str] | None:
    """Split a key into the module as written and what it holds: A, B, magnitude or alpha."""
    if found := _MATRIX.search(key):
        return key[: found.start()], "A" if found["A"] or found["down"] else "B"
    if found := _MAGNITUDE.search(key):
        return key[: found.start()], "magnitude"
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    return None


def _nearest(written: str) -> str:
    """Find the known name that is most like a written one, its prefix aside."""
    number = re.search(r"blocks[._](\d+)[._]", written)
    if number:
        name = "blocks.N." + written[number.end() :]
    else:
        words = re.split(r"[._]", written)
        while len(words) > 1 and words[0] in _PREFIX_WORDS:
            del words[0]
        name = ".".join(words)
    known = [name for pair in ORIGINAL_NAMES.items() for name in pair]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return _numbered(near[0], number[1] if number else "")


def template(name: str) -> tuple[str, str]:
    """Replace the block's number in a name: `blocks.3.x` is (`blocks.N.x`, `3`)."""
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
    for name, pattern in (*PRESETS.items(), *IMAGE_PRESETS.items()):
        linears = {_numbered(linear, n) for linear in ORIGINAL_NAMES for n in numbers}
        if found == {linear for linear in linears if re.fullmatch(pattern, linear)}:
            return name
    return None


def _numbered(name: str, number: str) -> str:
    return name.replace("N", number, 1) if number else name
