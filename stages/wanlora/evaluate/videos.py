"""The videos of each model, from the same prompts and the same noise, and measures of them.

Owns: their names, which are made of everything that decides their pixels, so that one that is there
is never made again; and what is said of them in evaluation.json. Prompts are cached embeddings: no
text encoder is loaded.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora import __version__, progress
from wanlora.core import quality
from wanlora.core.buckets import latent_shape, num_tokens
from wanlora.core.fingerprint import fingerprint
from wanlora.core.flops import step_flops
from wanlora.core.prompts import Dealt, deal, slug
from wanlora.core.validation import mean_interval
from wanlora.errors import MediaError, ModelError, RunError
from wanlora.evaluate.setup import Setup
from wanlora.evaluate.subjects import Subject
from wanlora.media import recorded
from wanlora.media.decode import decode
from wanlora.store.views import ViewClip
from wanlora.wan.attach import attach, detach
from wanlora.wan.denoise import denoise
from wanlora.wan.encoders import decode_latents, load_vae

MEASURES: dict[str, Callable[[Any], float]] = {
    "motion": quality.motion,
    "consistency": quality.consistency,
    "sharpness": quality.sharpness,
}
REAL = "real clip"
"""What the clips themselves are called beside the models."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Video:
    """One video of one model, or a cached clip as the VAE decodes it.

    Attributes:
        facts: Everything that decides its pixels; its name ends in their fingerprint.
        clip: The clip to decode; None = made from noise.
    """

    activity: str
    prompt: str
    prompt_key: str
    seed: int
    path: Path
    facts: Mapping[str, Any]
    clip: ViewClip | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """The base, or the base with a subject's adapter, and the videos it is to make.

    The real clips stand beside them as one more: what a model would ideally show.
    """

    name: str
    subject: Subject | None
    videos: tuple[Video, ...]

    @property
    def missing(self) -> list[Video]:
        """Those that are not there whole, each once."""
        unique = {video.path: video for video in self.videos}
        return [video for video in unique.values() if recorded.read_record(video.path) is None]


def plan(
    setup: Setup,
    subjects: Sequence[Subject],
    *,
    num_videos: int,
    fps: float,
    base_dir: Path,
    output_dir: Path,
) -> list[Model]:
    """Plan `num_videos` of each activity by each model, the base first."""
    dealt = _dealt(setup, num_videos)

    def of(name: str, subject: Subject | None, folder: Path) -> Model:
        videos = []
        for item in dealt:
            key = setup.prompts[item.activity][item.prompt]
            facts = _facts(setup, subject, key, item.seed, fps)
            place = folder / slug(item.activity or "all")
            file = f"{slug(item.prompt)}-seed{item.seed}-{fingerprint(facts)[:12]}.mp4"
            videos.append(Video(item.activity, item.prompt, key, item.seed, place / file, facts))
        return Model(name, subject, tuple(videos))

    folder = output_dir / "videos"
    adapted = [of(item.name, item, folder / slug(item.name)) for item in subjects]
    return [of("base", None, base_dir), *adapted]


def plan_clips(setup: Setup, *, num_videos: int, fps: float, output_dir: Path) -> Model | None:
    """Plan the clips whose captions the prompts are, in the same order.

    None when a clip has another size than the videos: they would not compare.
    """
    by_caption: dict[str, ViewClip] = {}
    for clip in setup.view.clips:
        for key in clip.prompts:
            by_caption.setdefault(key, clip)
    by_caption |= {key: clip for clip in setup.panel.clips for key in clip.prompts}
    videos = []
    for item in _dealt(setup, num_videos):
        key = setup.prompts[item.activity][item.prompt]
        clip = by_caption[key]
        if clip.bucket != setup.bucket:
            return None
        facts = {"clip": clip.key, "latents": setup.view.latents, "vae": setup.weights["vae"],
                 "size": list(setup.bucket), "fps": fps}  # fmt: skip
        place = output_dir / "videos" / slug(REAL) / slug(item.activity or "all")
        file = f"{slug(clip.clip_id)}-{fingerprint(facts)[:12]}.mp4"
        videos.append(
            Video(item.activity, item.prompt, key, item.seed, place / file, facts, clip=clip)
        )
    return Model(REAL, None, tuple(videos))


def _dealt(setup: Setup, num_videos: int) -> list[Dealt]:
    prompts = {activity: list(texts) for activity, texts in setup.prompts.items()}
    return deal(prompts, num_videos, seed=setup.source.seed)


def _facts(
    setup: Setup, subject: Subject | None, prompt_key: str, seed: int, fps: float
) -> dict[str, Any]:
    scaled = subject.scaled if subject else None
    return {
        **setup.facts,
        "adapter": [scaled.sha256, scaled.scale] if scaled else None,
        "prompt_key": prompt_key,
        "negative_prompt_key": setup.view.negative_prompt if setup.guidance_scale > 1 else None,
        "seed": seed,
        "size": list(setup.bucket),
        "steps": setup.steps,
        "guidance_scale": setup.guidance_scale,
        "shift": setup.source.shift,
        "fps": fps,
    }


def describe(setup: Setup, models: Sequence[Model]) -> str:
    """Say how many videos there are to make, and what they cost."""
    todo = [(model, len(model.missing)) for model in models]
    flops = sum(number * _flops(setup, model.subject) for model, number in todo)
    number = sum(number for _, number in todo)
    total = sum(len(model.videos) for model in models)
    return (
        f"{total} videos of {setup.bucket} ({len(models)} models x {len(models[0].videos)}), "
        f"{total - number} there already; {number} to make: {setup.steps} steps x "
        f"{_passes(setup)} forward passes each, {_unit(flops, 'FLOP')} in all"
    )


def _passes(setup: Setup) -> int:
    return 2 if setup.guidance_scale > 1 else 1


def _flops(setup: Setup, subject: Subject | None) -> float:
    """FLOPs of one video's forward passes; the VAE is not counted."""
    tensors = subject.scaled.adapter.tensors if subject else {}
    ranks = [len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight")]
    counted = step_flops(
        setup.variant.transformer_shape,
        num_tokens(setup.bucket),
        rank=max(ranks, default=0),
        adapted={name.partition(".lora_")[0] for name in tensors},
    )
    return counted.forward.total * setup.steps * _passes(setup)


def _unit(number: float, unit: str) -> str:
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number / 1e9:.3g} G{unit}"


def decode_clips(setup: Setup, clips: Model) -> None:
    """Decode the real clips that are not there yet."""
    if not clips.missing:
        return
    vae = load_vae(setup.folder, dtype=torch.float32, device=setup.device, tf32=True)
    with progress.bar(total=len(clips.missing), description="clips", unit="clip") as bar:
        for video in clips.missing:
            assert video.clip
            latents = setup.source.latents(video.clip)[None]
            _write(video, clips, decode_latents(vae, latents)[0].cpu().numpy())
            bar.update()


def make(setup: Setup, models: Sequence[Model], load: Callable[[], Any]) -> None:
    """Make the videos that are missing; killed at any time, the others stay.

    Args:
        setup: What all models share.
        models: From `plan`.
        load: Gives the transformer, without adapters; called only when a video is missing.

    Raises:
        ModelError: A video is not finite.
    """
    todo = [(model, missing) for model in models if (missing := model.missing)]
    if not todo:
        return
    transformer = load()
    vae = load_vae(setup.folder, dtype=torch.float32, device=setup.device, tf32=True)
    number = sum(len(missing) for _, missing in todo)
    _say_how_long(setup, transformer, number)
    with progress.bar(total=number * setup.steps, description="videos", unit="step") as bar:
        for model, missing in todo:
            if model.subject:
                attach(transformer, [model.subject.scaled])
            for place, video in enumerate(missing):
                bar.set_postfix_str(f"{model.name} {place + 1}/{len(missing)}", refresh=False)
                frames = generate(setup, transformer, vae, video, on_step=lambda: bar.update(1))
                _write(video, model, frames)
            if model.subject:
                detach(transformer)


def generate(
    setup: Setup,
    transformer: Any,
    vae: Any,
    video: Video,
    *,
    on_step: Callable[[], object] = lambda: None,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Make a video, bit for bit what WanPipeline makes of the same embeddings and seed.

    Raises:
        ModelError: It is not finite.
    """
    latents = denoise(
        transformer,
        prompt_embeds=setup.source.padded_prompt(video.prompt_key),
        negative_embeds=setup.source.padded_prompt(setup.view.negative_prompt),
        shape=latent_shape(setup.bucket, setup.variant.z_dim),
        steps=setup.steps,
        guidance_scale=setup.guidance_scale,
        shift=setup.source.shift,
        seed=video.seed,
        device=setup.device,
        dtype=setup.dtype,
        on_step=on_step,
    )
    if not torch.isfinite(latents).all():
        raise ModelError(
            f"the video for {video.prompt!r}, seed {video.seed}, holds NaN: the model's or the "
            f"adapter's weights are wrong ({video.path.parent})"
        )
    return decode_latents(vae, latents[None])[0].cpu().numpy()


def _say_how_long(setup: Setup, transformer: Any, number: int) -> None:
    """Time a forward pass at the size of the videos, the second one, and tell the hours from it."""
    shape = (1, *latent_shape(setup.bucket, setup.variant.z_dim))
    text = (1, setup.variant.max_sequence_length, setup.variant.text_dim)
    inputs = {
        "hidden_states": torch.zeros(shape, device=setup.device, dtype=setup.dtype),
        "timestep": torch.full((1,), 500.0, device=setup.device),
        "encoder_hidden_states": torch.zeros(text, device=setup.device, dtype=setup.dtype),
    }
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            transformer(**inputs, return_dict=False)[0].float().sum().item()  # waits for the GPU
        seconds = time.perf_counter() - started
    passes = setup.steps * _passes(setup)
    pace = _flops(setup, None) / passes / seconds
    minutes = number * passes * seconds / 60
    about = f"{minutes / 60:.1f} h" if minutes > 90 else f"{max(minutes, 0.1):.1f} min"
    logger.info(
        "a forward pass takes %.3g s here (%s/s): about %s for %d videos, decoding not counted",
        seconds, _unit(pace, "FLOP"), about, number,
    )  # fmt: skip


def _write(video: Video, model: Model, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
    brightness = quality.luma(frames)
    record = {
        "prompt": video.prompt,
        "activity": video.activity,
        "model": model.name,
        "adapter_file": model.subject.scaled.record if model.subject else None,
        **video.facts,
        "measures": {name: measure(brightness) for name, measure in MEASURES.items()},
        "wanlora": __version__,
    }
    recorded.write(video.path, frames, record=record)


# --- what they say ---


def frames_of(video: Video) -> UInt8[np.ndarray, "t h w 3"]:
    """Pixels of a video that was made, as its file has them.

    Raises:
        RunError: The file is damaged.
    """
    num_frames, _, _ = video.facts["size"]
    try:
        return decode(video.path, start_s=0, fps=video.facts["fps"], num_frames=num_frames)
    except MediaError as error:
        raise RunError(
            f"{video.path} is not the video that was written ({error.code}): delete it, and run "
            "the same command again to make it anew"
        ) from error


def measured(model: Model) -> dict[str, Any]:
    """Means of the measures by activity, each with the diversity of the activity's videos."""
    by_activity: dict[str, dict[Path, Video]] = {}
    for video in model.videos:
        by_activity.setdefault(video.activity, {})[video.path] = video
    return {activity: _of_activity(list(videos.values())) for activity, videos in
            by_activity.items()}  # fmt: skip


def _of_activity(videos: Sequence[Video]) -> dict[str, float | None]:
    means: dict[str, float | None] = {
        name: float(np.mean([_measures(video)[name] for video in videos])) for name in MEASURES
    }
    small = [quality.shrink(quality.luma(frames_of(video))) for video in videos]
    return means | {"diversity": quality.diversity(small)}


def against_base(model: Model, base: Model) -> dict[str, Any]:
    """Mean difference of each measure to the base's video of the same prompt and noise."""
    pairs = list(zip(model.videos, base.videos, strict=True))
    result = {}
    for name in MEASURES:
        values = np.array([_measures(own)[name] - _measures(other)[name] for own, other in pairs])
        mean, _, interval = mean_interval(values)
        result[name] = {"paired_difference": mean, "ci95": list(interval) if interval else None}
    return result


def _measures(video: Video) -> dict[str, float]:
    record = recorded.read_record(video.path)
    assert record, video.path
    measures: dict[str, float] = record["measures"]
    return measures
