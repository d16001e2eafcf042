"""Modules of the transformer that get an adapter.

Owns: the presets, and the rule that each given target must match. Must not know: LoRA, torch.
"""

import re
from collections.abc import Iterable, Sequence

from wanlora.errors import AdapterError

_ATTENTION = r"blocks\.\d+\.(attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)"
_FFN = r"blocks\.\d+\.ffn\.net\.(0\.proj|2)"
_CONDITION = (
    r"condition_embedder\.(time_embedder\.linear_[12]|time_proj|text_embedder\.linear_[12])"
)

_IMAGE_ATTENTION = r"blocks\.\d+\.attn2\.add_[kv]_proj"
_IMAGE_EMBEDDER = r"condition_embedder\.image_embedder\.ff\.net\.(0\.proj|2)"

# proj_out, the head, is left out: ComfyUI's loader refuses it.
PRESETS: dict[str, str] = {
    "attention": _ATTENTION,
    "attention+ffn": f"{_ATTENTION}|{_FFN}",
    "all-linear": f"{_ATTENTION}|{_FFN}|{_CONDITION}",
}
IMAGE_PRESETS: dict[str, str] = {
    "attention": f"{PRESETS['attention']}|{_IMAGE_ATTENTION}",
    "attention+ffn": f"{PRESETS['attention+ffn']}|{_IMAGE_ATTENTION}",
    "all-linear": f"{PRESETS['all-linear']}|{_IMAGE_ATTENTION}|{_IMAGE_EMBEDDER}",
}
"""The presets for a transformer that reads embeddings of an image: its keys and values too."""


def linear_names(num_layers: int, *, reads_image: bool = False) -> list[str]:
    """Name the linear modules of a WanTransformer3DModel without building one.

    Args:
        num_layers: Number of blocks.
        reads_image: True if the transformer reads embeddings of an image (`image_dim`).
    """
    condition = "condition_embedder"
    names = [f"{condition}.time_embedder.linear_{i}" for i in (1, 2)] + [f"{condition}.time_proj"]
    names += [f"{condition}.text_embedder.linear_{i}" for i in (1, 2)]
    if reads_image:
        names += [f"{condition}.image_embedder.ff.net.{part}" for part in ("0.proj", "2")]
    for index in range(num_layers):
        names += [
            f"blocks.{index}.{attention}.{part}"
            for attention in ("attn1", "attn2")
            for part in ("to_q", "to_k", "to_v", "to_out.0")
        ]
        if reads_image:
            names += [f"blocks.{index}.attn2.{part}" for part in ("add_k_proj", "add_v_proj")]
        names += [f"blocks.{index}.ffn.net.{part}" for part in ("0.proj", "2")]
    return [*names, "proj_out"]


def match_targets(linears: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """List the linear modules that `targets` matches.

    Args:
        linears: Names of all linear modules.
        targets: A preset's name; a regex that must match a whole module name; or a list of names
            or ends of names (`to_q`, `ffn.net.2`), each of which must match.

    Raises:
        AdapterError: A target matches no linear module (peft would ignore it).
    """
    if isinstance(targets, str):
        try:
            pattern = re.compile(IMAGE_PRESETS.get(targets, targets))
        except re.error as error:
            raise AdapterError(f"targets {targets!r} is not a regex: {error}") from None
        found = [name for name in linears if pattern.fullmatch(name)]
        if not found:
            raise AdapterError(_no_match(f"targets {targets!r}", linears))
        return found
    if not targets:
        raise AdapterError(_no_match("an empty list of targets", linears))
    matches = {
        target: {name for name in linears if name == target or name.endswith(f".{target}")}
        for target in targets
    }
    if missing := [target for target, names in matches.items() if not names]:
        raise AdapterError(_no_match(f"target {', '.join(map(repr, missing))}", linears))
    wanted = set().union(*matches.values())
    return [name for name in linears if name in wanted]


def preset_pattern(targets: str | Sequence[str], modules: Iterable[str]) -> str | None:
    """Return the regex of a preset; None if `targets` is not the name of a preset.

    Args:
        targets: See `match_targets`.
        modules: Names of the modules that it matches.
    """
    if not isinstance(targets, str):
        return None
    reads_image = any(re.fullmatch(_IMAGE_ATTENTION, name) for name in modules)
    return (IMAGE_PRESETS if reads_image else PRESETS).get(targets)


def _no_match(what: str, names: Iterable[str]) -> str:
    known = sorted({re.sub(r"^blocks\.\d+\.", "blocks.N.", name) for name in names})
    return (
        f"{what} matches no linear module of the transformer; its linear modules are: "
        f"{', '.join(known)}. Presets: {', '.join(PRESETS)}"
    )
