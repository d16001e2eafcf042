"""The run's README.md: a Hugging Face model card that describes the adapter and its use.

Owns: the text, and the marks around its generated part. Pure functions of plain values; the values
are decided where the run is opened.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from wanlora.commands.train.session import Session
from wanlora.config import TrainConfig
from wanlora.core import units
from wanlora.core.buckets import DEFAULT_FPS, usual
from wanlora.core.intervals import describe_sample
from wanlora.runs.run_folder import ADAPTER_NAME, preview_folders
from wanlora.store.views import frame_rate
from wanlora.wan.model_folder import public_name

PIPELINE_TAG = "text-to-video"
TAGS = ("lora", "text-to-video", "wan", "wanlora", "diffusers")
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

NUM_PROMPTS = 3
FOLDER = "FOLDER"
"""Place of the adapter in the commands; a push replaces it in the code for diffusers."""


def model_card(facts: Mapping[str, Any]) -> str:
    """Write the card: the head for the hub and the title, then the generated part in its marks.

    Args:
        facts: What is known; anything but `name` and `model` may be absent.

            - name, model, variant: the run's name, the base's id or folder, its row;
            - step, end_step, epochs, seed, trainable_parameters, precision;
            - num_clips, activities (names to numbers of clips), buckets (names to numbers),
              view, view_sha256;
            - settings: names and values to list;
            - loss: last smoothed training loss; best, final: lines of validation.jsonl;
            - prompts: real ones, from the view or its captions; num_frames, height, width, fps,
              guidance_scale;
            - previews: paths of pictures, relative to the card;
            - provenance: versions, fingerprints, store_digest, git_commit, ...
    """
    parts = [
        _what(facts),
        _section("Use", _usage(facts), _other_tools(facts), _license(facts)),
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
    """Put the generated part of a new card into one that is there, and keep everything else of it.

    Args:
        found: The card that is there; a person may have edited it.
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


def _digest(text: str) -> str:
    """Name a text, whatever its line ends."""
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()[:16]


def card_facts(
    config: TrainConfig,
    session: Session,
    *,
    loss: float | None,
    best: Mapping[str, Any] | None,
    final: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Gather the facts of a run for `model_card`.

    Args:
        config: Its settings.
        session: What was trained.
        loss: Smoothed training loss.
        best: Row of validation.jsonl for the adapter in `best/`.
        final: The last row for the newest adapter on held-out clips.
    """
    clips, view = session.data.clips, session.data.view
    buckets = Counter(clip.bucket for clip in clips)
    bucket = usual(clip.bucket for clip in clips)
    return {
        "name": config.output_dir.resolve().name,
        "model": public_name(session.facts["model"]),
        "variant": session.variant.name,
        "step": session.progress.step,
        "end_step": session.end_step,
        "epochs": float(session.progress.step / session.data.source.order.steps_per_epoch),
        "seed": config.seed,
        "trainable_parameters": sum(p.numel() for p in session.masters.parameters.values()),
        "precision": str(session.dtype).removeprefix("torch."),
        "num_clips": len(clips),
        "activities": dict(sorted(Counter(clip.activity for clip in clips).items())),
        "buckets": {str(size): count for size, count in sorted(buckets.items())},
        "view": view.name,
        "view_sha256": view.sha256,
        "settings": {
            "rank": session.shape.rank,
            "alpha": session.shape.alpha,
            "targets": session.shape.targets,
            "learning rate": session.optimizer.param_groups[0]["initial_lr"],
            "optimizer": config.optimizer.name,
            "global batch": _global_batch(session),
            "sigma": f"{config.flow.sampler}, shift {session.data.source.shift:g}",
        },
        "loss": loss,
        "best": best,
        "final": final,
        "num_frames": bucket.num_frames,
        "height": bucket.height,
        "width": bucket.width,
        "fps": frame_rate(clips),
        "guidance_scale": session.variant.guidance_scale,
        "prompts": _prompts(config, session),
        "previews": _previews(config.output_dir),
        "provenance": session.facts | {"model": public_name(session.facts["model"])},
    }


def _prompts(config: TrainConfig, session: Session) -> list[str]:
    """Prompts of the previews, else captions of held-out clips, else of clips trained on."""
    view = session.data.view
    if view.validation_prompts:
        return [prompt.prompt for prompt in view.validation_prompts[:NUM_PROMPTS]]
    held_out = [clip for clip in view.clips if clip.split == config.validation.split]
    clips = held_out or session.data.clips
    keys = list(dict.fromkeys(clip.prompts[0] for clip in clips if clip.prompts))[:NUM_PROMPTS]
    return list(session.data.source.reader.prompts(keys).values())


def _previews(run_dir: Path) -> list[str]:
    """Pictures of the newest previews, relative to the run's folder."""
    folders = preview_folders(run_dir)
    files = sorted(folders[-1].glob("*.gif")) if folders else []
    return [file.relative_to(run_dir).as_posix() for file in files]


def _global_batch(session: Session) -> str:
    sizes = {bucket: size.global_batch for bucket, size in session.data.sizes.items()}
    if len(set(sizes.values())) == 1:
        return str(next(iter(sizes.values())))
    return ", ".join(f"{size} of {bucket}" for bucket, size in sizes.items())


def _front_matter(facts: Mapping[str, Any]) -> str:
    """YAML that the hub accepts: a base model there must be a repository's id, not a folder."""
    model = str(facts["model"])
    data = ModelCardData(
        base_model=model if _is_hub_id(model) else None,
        license=_base_license(model),
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG,
        tags=list(TAGS),
    )
    return str(data.to_yaml())


def _what(facts: Mapping[str, Any]) -> str:
    number = facts.get("trainable_parameters")
    size = f" of {units.number(number)} parameters" if number else ""
    model = str(facts["model"])
    shown = f"[{model}](https://huggingface.co/{model})" if _is_hub_id(model) else f"`{model}`"
    return (
        f"A LoRA adapter{size} for the video model {shown}, trained with wanlora on cached "
        "latents. The file is in diffusers' own layout."
    )


def _usage(facts: Mapping[str, Any]) -> str:
    prompts = facts.get("prompts") or ["A person walking"]
    names = ("num_frames", "height", "width", "guidance_scale")
    size = [f"{key}={facts[key]}" for key in names if key in facts]
    call = ", ".join([_quoted(prompts[0]), *size])
    with_diffusers = [
        "```python",
        "import torch",
        "from diffusers import AutoencoderKLWan, WanPipeline",
        "from diffusers.utils import export_to_video",
        "",
        f"model = {_quoted(facts['model'])}",
        'vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)',
        "pipeline = WanPipeline.from_pretrained(model, vae=vae, torch_dtype=torch.bfloat16)",
        f'pipeline.load_lora_weights("{FOLDER}", weight_name="{ADAPTER_NAME}")',
        'pipeline.to("cuda")',
        f"video = pipeline({call}).frames[0]",
        f'export_to_video(video, "video.mp4", fps={facts.get("fps", DEFAULT_FPS):g})',
        "```",
        "",
        "or",
        "",
    ]
    with_wanlora = [
        "```sh",
        f"wanlora sample --adapter {FOLDER} --prompt {_shell_quoted(prompts[0])}",
        "```",
    ]
    if len(prompts) > 1:
        more = [f"- {_plain(prompt)}" for prompt in prompts[1:]]
        with_wanlora += ["", "More prompts:", "", *more]
    # Only wanlora knows the embedded model by its name.
    return "\n".join(with_wanlora if facts["model"] == "micro" else with_diffusers + with_wanlora)


def _other_tools(facts: Mapping[str, Any]) -> str:
    """ComfyUI ignores diffusers' names: the file loads there without an error or an effect."""
    if facts["model"] == "micro":
        return ""
    return (
        "`FOLDER` is this folder or repository. ComfyUI and kohya's tools need another file; in "
        "ComfyUI this one has no effect, or part of it. Convert it:\n\n```sh\n"
        f"wanlora export --adapter {FOLDER} --format comfyui --output "
        f"{_shell_quoted(facts['name'] + '.safetensors')}\n```"
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
        "precision": facts.get("precision"),
        "seed": facts.get("seed"),
        "training loss (smoothed)": facts.get("loss"),
        **facts.get("settings", {}),
    }


def _validation(facts: Mapping[str, Any]) -> str:
    """Held-out loss beside the base's, where it was measured."""
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
        [str(key), f"`{_plain(value)}`" if len(str(value)) > 30 else _plain(value)]
        for key, value in rows.items()
        if value is not None and value != ""
    ]
    return _grid(["", ""], shown) if shown else ""


def _grid(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _counts(counts: Mapping[str, int] | None) -> str | None:
    """`walking 12, sitting 9, ...`, the largest first; many are cut, and said to be."""
    if not counts:
        return None
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return units.names((f"{name or 'none'} {number}" for name, number in ordered), most=12)


def _plain(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("`", "'")


def _quoted(text: Any) -> str:
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def _shell_quoted(text: Any) -> str:
    return "'" + str(text).replace("'", "'\\''").replace("\n", " ") + "'"


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) is not None
