"""Facts of a run for its model card.

Owns: the list of facts of the card. `model_card` has the text.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from wanlora.commands.train.data import Data
from wanlora.commands.train.session import Session, TrainedModel
from wanlora.core.buckets import usual
from wanlora.runs import run_folder
from wanlora.store.views import frame_rate
from wanlora.wan.model_folder import public_name
from wanlora.wan.variants import TransformerPart

NUM_PROMPTS = 3


def card_facts(
    session: Session,
    *,
    loss: float | None,
    best: Mapping[str, Any] | None,
    final: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Gather the facts of a run for `model_card`.

    Args:
        session: The run.
        loss: Smoothed training loss.
        best: Row of validation.jsonl for the adapter in `best/`.
        final: The last row for the newest adapter on held-out clips.
    """
    model, data, run = session.model, session.data, session.run
    clips, view = data.clips, data.view
    name = public_name(run.facts["model"])
    buckets = Counter(clip.bucket for clip in clips)
    bucket = usual(clip.bucket for clip in clips)
    return {
        "name": run.folder.resolve().name,
        "model": name,
        "variant": model.variant.name,
        "is_i2v": model.variant.is_i2v,
        "reads_image": model.variant.shape.image_dim is not None,
        "expert": model.part.expert,
        "sigmas": model.part.sigmas,
        "step": run.progress.step,
        "end_step": run.end_step,
        "epochs": float(run.progress.step / data.source.order.steps_per_epoch),
        "seed": data.source.seed,
        "trainable_parameters": sum(p.numel() for p in model.masters.parameters.values()),
        "precision": str(model.dtype).removeprefix("torch."),
        "quantize": model.quantize if model.quantize != "none" else None,
        "num_clips": len(clips),
        "activities": dict(sorted(Counter(clip.activity for clip in clips).items())),
        "buckets": {str(size): count for size, count in sorted(buckets.items())},
        "view": view.name,
        "view_sha256": view.sha256,
        "settings": _settings(model, data),
        "loss": loss,
        "best": best,
        "final": final,
        "num_frames": bucket.num_frames,
        "height": bucket.height,
        "width": bucket.width,
        "fps": frame_rate(clips),
        "guidance_scales": [part.guidance_scale for part in model.variant.transformers],
        "prompts": _prompts(data),
        "previews": [
            file.relative_to(run.folder).as_posix()
            for file in run_folder.newest_pictures(run.folder)
        ],
        "provenance": {**run.facts, "model": name},
    }


def _settings(model: TrainedModel, data: Data) -> dict[str, Any]:
    return {
        "rank": model.shape.rank,
        "alpha": model.shape.alpha,
        "targets": model.shape.targets,
        "learning rate": model.peak_rate,
        "optimizer": model.optimizer_name,
        "global batch": _global_batch(data),
        "attention kernel": model.kernel.describe(),
        "sigma": f"{data.source.sampler}, shift {data.source.shift:g}{_range(model.part)}",
        **_condition(data),
    }


def _condition(data: Data) -> dict[str, str]:
    """Share of clips that are trained without their first frame; empty for text to video."""
    if "cond_latents" not in data.source.kinds:
        return {}
    return {"condition dropout": f"{data.source.condition_dropout:g}"}


def _range(part: TransformerPart) -> str:
    """Range of an expert, after a comma; empty for all noise levels."""
    return f", range {part.sigmas[0]:g} to {part.sigmas[1]:g}" if part.expert else ""


def _prompts(data: Data) -> list[str]:
    """Validation prompts of the view, else captions of held-out clips, else of training clips."""
    if data.view.validation_prompts:
        return [prompt.prompt for prompt in data.view.validation_prompts[:NUM_PROMPTS]]
    clips = data.held_out or data.clips
    keys = list(dict.fromkeys(clip.prompts[0] for clip in clips if clip.prompts))[:NUM_PROMPTS]
    return list(data.source.reader.prompts(keys).values())


def _global_batch(data: Data) -> str:
    sizes = {bucket: size.global_batch for bucket, size in data.sizes.items()}
    if len(set(sizes.values())) == 1:
        return str(next(iter(sizes.values())))
    return ", ".join(f"{size} of {bucket}" for bucket, size in sizes.items())
