"""The run's README.md: a Hugging Face model card that describes the adapter and its use.

Owns: the text, and the marks around its generated part. `card_facts` gathers the values, and
`card_usage` writes how the adapter is used.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from wanlora.commands.train.card_usage import other_tools, plain, usage
from wanlora.core import units
from wanlora.core.intervals import describe_sample
from wanlora.files import write_text

TAGS = ("lora", "wan", "wanlora", "diffusers")
LICENSES = {"Wan-AI": "apache-2.0"}
"""License of the models of an organization on the hub; from the model cards of Wan-AI."""

_BEGIN = (
    "<!-- wanlora: training writes this part again (sha256 {digest}); your own text is kept before "
    "and after it -->"
)
_END = "<!-- wanlora: end of the part that training writes -->"
_GENERATED = re.compile(
    re.escape(_BEGIN).replace(r"\{digest\}", "(?P<digest>[0-9a-f]{16})")
    + r"\r?\n(?P<text>.*?)"
    + re.escape(_END),
    re.DOTALL,
)

logger = logging.getLogger(__name__)

_SUBFOLDERS = {"high": "transformer", "low": "transformer_2"}


def model_card(facts: Mapping[str, Any]) -> str:
    """Write the card: the head for the hub and the title, then the generated part in its marks.

    Args:
        facts: Facts of the run; all except `name` and `model` may be absent.

            - name, model, variant: the run's name, the base's id or folder, its row;
            - is_i2v, reads_image: True for an image-to-video model, and for one whose transformer
              reads embeddings of the image;
            - expert, sigmas: the transformer that it is for, of a model with two, and its range;
            - step, end_step, epochs, seed, trainable_parameters, precision; quantize: format of
              the weights in the base's blocks, if it was not their own;
            - num_clips, activities (names to numbers of clips), buckets (names to numbers),
              view, view_sha256;
            - settings: names and values to list;
            - loss: last smoothed training loss; best, final: lines of validation.jsonl;
            - prompts: real ones, from the view or its captions; num_frames, height, width, fps,
              guidance_scales: one per transformer;
            - previews: paths of pictures, relative to the card;
            - provenance: versions, fingerprints, store_digest, git_commit, ...
    """
    parts = [
        _what(facts),
        _section("Use", usage(facts), other_tools(facts), _license(facts)),
        _section("Previews", _pictures(facts)),
        _section("Data", _data(facts)),
        _section("Training", _table(_training(facts)), _validation(facts)),
        _section("Provenance", _table(facts.get("provenance", {}))),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    begin = _BEGIN.format(digest=_digest(text))
    head = f"---\n{_front_matter(facts)}\n---\n\n# {facts['name']}"
    return f"{head}\n\n{begin}\n{text}{_END}\n"


def updated_card(found: str, made: str) -> str | None:
    """Replace the generated part of an existing card with that of a new one.

    Args:
        found: The existing card; a person may have edited it.
        made: From `model_card`.

    Returns:
        The card; None if its generated part was edited, or has no marks.
    """
    parts = list(_GENERATED.finditer(found))
    new = _GENERATED.search(made)
    assert new
    if len(parts) != 1 or _digest(parts[0]["text"]) != parts[0]["digest"]:
        return None
    return found[: parts[0].start()] + new[0] + found[parts[0].end() :]


def write_card(path: Path, text: str) -> None:
    """Write the card, or update the generated part of an existing one.

    A card whose generated part was edited is kept, with a warning.

    Args:
        path: Path of the card.
        text: From `model_card`.
    """
    if not path.exists():
        write_text(path, text)
        return
    try:
        card = updated_card(path.read_bytes().decode(), text)
    except UnicodeDecodeError:
        card = None
    if card is None:
        logger.warning(
            "%s is kept as it is: the part that training writes was edited or has no marks. To "
            "have it written again, move the file away and run the command again",
            path,
        )
        return
    write_text(path, card)


def _digest(text: str) -> str:
    """Digest of a text that does not depend on its line endings."""
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()[:16]


def _front_matter(facts: Mapping[str, Any]) -> str:
    """YAML for the hub; it accepts only a repository's id as base model, not a folder."""
    model = str(facts["model"])
    task = "image-to-video" if facts.get("is_i2v") else "text-to-video"
    data = ModelCardData(
        base_model=model if _is_hub_id(model) else None,
        license=_base_license(model),
        library_name="diffusers",
        pipeline_tag=task,
        tags=[TAGS[0], task, *TAGS[1:]],
    )
    return str(data.to_yaml())


def _what(facts: Mapping[str, Any]) -> str:
    number = facts.get("trainable_parameters")
    size = f" of {units.number(number)} parameters" if number else ""
    model = str(facts["model"])
    shown = f"[{model}](https://huggingface.co/{model})" if _is_hub_id(model) else f"`{model}`"
    return (
        f"A LoRA adapter{size} for the video model {shown}, trained with wanlora on cached "
        "latents. The file is in diffusers' own layout." + _which_expert(facts)
    )


def _which_expert(facts: Mapping[str, Any]) -> str:
    """Name the transformer that the adapter is for, and its noise levels; empty for one of one."""
    if not (expert := facts.get("expert")):
        return ""
    other = "low" if expert == "high" else "high"
    low, high = facts["sigmas"]
    return (
        f"\n\nThe model has two transformers. This adapter is for the **{expert}-noise expert** "
        f"(`{_SUBFOLDERS[expert]}`, sigma {low:g} to {high:g}) and has no effect on the "
        f"{other}-noise expert, which can have an adapter of its own."
    )


def _license(facts: Mapping[str, Any]) -> str:
    license_name = _base_license(str(facts["model"]))
    if not license_name:
        return "License: that of the base model."
    return f"License of the base model: {license_name}. To use another, change `license` above."


def _base_license(model: str) -> str | None:
    return LICENSES.get(model.partition("/")[0]) if _is_hub_id(model) else None


def _pictures(facts: Mapping[str, Any]) -> str:
    paths = facts.get("previews") or []
    if not paths:
        return ""
    shown = " ".join(f"![preview {number}]({path})" for number, path in enumerate(paths))
    return f"{shown}\n\nLatents shown through a linear projection: small, and without the VAE."


def _data(facts: Mapping[str, Any]) -> str:
    rows = {
        "clips": facts.get("num_clips"),
        "sizes": _counts(facts.get("buckets")),
        "activities": _counts(facts.get("activities")),
        "view": facts.get("view"),
        "view sha256": facts.get("view_sha256"),
    }
    return _table(rows)


def _training(facts: Mapping[str, Any]) -> dict[str, Any]:
    step, end = facts.get("step"), facts.get("end_step")
    return {
        "steps": f"{step:,} of {end:,}" if step is not None and end and step != end else step,
        "epochs": facts.get("epochs"),
        "variant": facts.get("variant"),
        "expert": facts.get("expert"),
        "precision": facts.get("precision"),
        "frozen weights": facts.get("quantize"),
        "seed": facts.get("seed"),
        "training loss (smoothed)": facts.get("loss"),
        **facts.get("settings", {}),
    }


def _validation(facts: Mapping[str, Any]) -> str:
    """Table of held-out losses with the adapter and with the base, if they were measured."""
    rows = [
        [
            f"{name} (step {line['step']:,}{_of_average(line)})",
            f"{line['mean']:.4f}", f"{line['base_mean']:.4f}",
            f"{100 * line['difference'] / line['base_mean']:+.2f} %",
            "{:+.4f} to {:+.4f}".format(*line["ci95"]) if line.get("ci95") else "",
            describe_sample(line["num_clips"], line.get("num_groups")),
        ]
        for name in ("best", "final")
        if (line := facts.get(name))
    ]  # fmt: skip
    if not rows:
        return ""
    headers = [
        "held-out loss", "adapter", "base", "change", "95 % interval of the difference",
        "measured on",
    ]  # fmt: skip
    return (
        _grid(headers, rows)
        + "\n\nMean squared error of the predicted velocity on fixed held-out clips, noise levels "
        "and noise; lower is better. A run keeps its best adapter in `best/`; `wanlora export` "
        "selects it with `--checkpoint best`."
    )


def _of_average(line: Mapping[str, Any]) -> str:
    return ", moving average" if line.get("weights") == "ema" else ""


def _section(heading: str, *parts: str) -> str:
    body = "\n\n".join(part for part in parts if part)
    return f"## {heading}\n\n{body}" if body else ""


def _table(rows: Mapping[str, Any]) -> str:
    shown = [
        [str(key), f"`{plain(value)}`" if len(str(value)) > 30 else plain(value)]
        for key, value in rows.items()
        if value is not None and value != ""
    ]
    return _grid(["", ""], shown) if shown else ""


def _grid(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _counts(counts: Mapping[str, int] | None) -> str | None:
    """List counts as `walking 12, sitting 9 and 4 more`, the largest first."""
    if not counts:
        return None
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return units.names((f"{name or 'none'} {number}" for name, number in ordered), most=12)


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) is not None
