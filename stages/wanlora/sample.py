"""`wanlora sample`: prompts to mp4, with an adapter or without; or saved latents to mp4.

Owns: which videos are made, what they are called, and the record beside each. Loads the adapter
with diffusers' own loader, so what it shows is what any diffusers user gets.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wanlora import __version__, progress
from wanlora.config import DEFAULT_MODEL, SampleConfig
from wanlora.core.buckets import Bucket, problem_with
from wanlora.errors import ConfigError, ModelError
from wanlora.files import require_folder, write_atomic
from wanlora.media import mp4
from wanlora.wan import pipeline as wan
from wanlora.wan.adapter import AdapterFile, read_adapter
from wanlora.wan.device import base_dtype, pick
from wanlora.wan.encoders import (
    MAX_SEQUENCE_LENGTH,
    decode_latents,
    load_tokenizer,
    load_vae,
    num_prompt_tokens,
)
from wanlora.wan.saved_latents import SavedLatents, find_latents, read_latents
from wanlora.wan.variants import PIPELINE, VARIANTS, Variant, resolve, variant_of
from wanlora.wan.weights import file_sha256

logger = logging.getLogger(__name__)

_SLUG_LENGTH = 48


@dataclass(frozen=True, slots=True)
class Video:
    """One video to make: its prompt, its seed, its file."""

    prompt: str
    seed: int
    path: Path

    @property
    def record(self) -> Path:
        """The JSON beside it."""
        return self.path.with_suffix(".json")


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What was made, with which weights."""

    videos: list[str]
    model: str
    adapter: str | None

    @property
    def exit_code(self) -> int:
        """Always 0: a video that cannot be made stops the command."""
        return 0

    def lines(self) -> list[str]:
        """Say where the videos are."""
        what = f"{self.model} with {self.adapter}" if self.adapter else f"{self.model}, no adapter"
        return [f"{len(self.videos)} video(s) from {what}:", *(f"  {file}" for file in self.videos)]


def run(config: SampleConfig) -> SampleResult:
    """Make every video asked for; what can be refused is refused before anything is loaded.

    Raises:
        WanloraError: A setting, the device, the model or the adapter does not do.
    """
    if config.latents:
        return _decode(config, config.latents)
    videos = plan(config)
    adapter = read_adapter(config.adapter) if config.adapter else None
    model = config.model or (adapter and adapter.provenance.get("model")) or DEFAULT_MODEL
    device = pick(config.device, model)
    folder = resolve(model, PIPELINE)
    settings = video_settings(config, variant_of(folder))
    _check_lengths(folder, [*config.prompt, settings.negative_prompt])
    pipeline = wan.load_pipeline(folder, dtype=base_dtype(config.dtype, device), device=device)
    if adapter:
        wan.load_adapter(pipeline, adapter, scale=config.scale)
    made_with = _provenance(config, model, adapter, settings, device)
    total = len(videos) * settings.steps
    with progress.bar(total=total, description="sample", unit="step") as bar:
        for number, video in enumerate(videos):
            bar.set_postfix_str(f"video {number + 1}/{len(videos)}", refresh=False)
            frames = wan.generate(
                pipeline, video.prompt, settings, seed=video.seed, on_step=lambda: bar.update(1)
            )
            _write(video, frames, config.fps, made_with)
    return SampleResult(
        videos=[str(video.path) for video in videos],
        model=model,
        adapter=str(adapter.path) if adapter else None,
    )


def plan(config: SampleConfig) -> list[Video]:
    """List the videos: `num_videos` for each prompt, with seeds seed, seed + 1, ...

    Raises:
        ConfigError: A file exists and may not be replaced, or one name stands for many videos.
        OutputError: The folder cannot be written.
    """
    pairs = [
        (prompt, config.seed + index)
        for prompt in config.prompt
        for index in range(config.num_videos)
    ]
    if config.output is not None:
        if len(pairs) > 1:
            raise ConfigError(
                f"--output {config.output} names one file for {len(pairs)} videos; use --output-dir"
            )
        if config.output.suffix.lower() != ".mp4":
            raise ConfigError(f"--output {config.output}: expected a name ending in .mp4")
        videos = [Video(*pairs[0], path=config.output)]
    else:
        videos = [
            Video(prompt, seed, config.output_dir / f"{number:03d}-{slug(prompt)}-seed{seed}.mp4")
            for number, (prompt, seed) in enumerate(pairs)
        ]
    _check_new(config, videos)
    return videos


def slug(prompt: str) -> str:
    """Shorten a prompt to a part of a file name: lower-case words joined by hyphens."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:_SLUG_LENGTH].strip("-_") or "empty"


def video_settings(config: SampleConfig, variant: Variant) -> wan.VideoSettings:
    """Complete the settings with the variant's defaults.

    Raises:
        ConfigError: Wan cannot take the size; diffusers would round it in silence.
    """
    defaults = wan.VideoSettings(
        num_frames=variant.num_frames,
        height=variant.height,
        width=variant.width,
        steps=variant.steps,
        guidance_scale=variant.guidance_scale,
        negative_prompt=variant.negative_prompt,
    )
    given = {
        name: value for name in asdict(defaults) if (value := getattr(config, name)) is not None
    }
    settings = replace(defaults, **given)
    if problem := problem_with(Bucket(settings.num_frames, settings.height, settings.width)):
        raise ConfigError(f"cannot sample {problem}")
    return settings


def _check_new(config: SampleConfig, videos: Sequence[Video]) -> None:
    """Refuse a folder that cannot be written, and to replace a video or its record unasked."""
    flag = "--output" if config.output is not None else "--output-dir"
    for folder in {video.path.parent for video in videos}:
        require_folder(folder, flag=flag)
    files = [file for video in videos for file in (video.path, video.record)]
    existing = [str(file) for file in files if file.exists()]
    if existing and not config.overwrite:
        more = f" and {len(existing) - 3} more" if len(existing) > 3 else ""
        raise ConfigError(
            f"{', '.join(existing[:3])}{more} would be replaced; pass --overwrite, or another "
            "--output-dir"
        )


def _decode(config: SampleConfig, source: Path) -> SampleResult:
    """Decode saved latents with the VAE of the model they are of."""
    saved = [read_latents(file) for file in find_latents(source)]
    videos = [_video_of(item, config.output_dir) for item in saved]
    _check_new(config, videos)
    models = {item.facts["model"] for item in saved}
    if config.model is None and len(models) > 1:
        raise ConfigError(
            f"{source} holds latents of {', '.join(sorted(models))}: pass one model's"
        )
    model = config.model or models.pop()
    device = pick(config.device, model)
    folder = resolve(model, ["vae"])
    for item in saved:
        _check_same_latents(item, model, variant_of(folder))
    vae = load_vae(folder, dtype=torch.float32, device=device, tf32=True)
    with progress.bar(total=len(saved), description="decode", unit="video") as bar:
        for item, video in zip(saved, videos, strict=True):
            frames = decode_latents(vae, item.latents[None])[0].cpu().numpy()
            made_with = {"latents": str(item.path), **item.facts, "versions": wan.versions()}
            _write(video, frames, config.fps, made_with)
            bar.update()
    return SampleResult(videos=[str(video.path) for video in videos], model=model, adapter=None)


def _video_of(item: SavedLatents, folder: Path) -> Video:
    prompt, seed = item.facts["prompt"], item.facts["seed"]
    name = f"{item.path.parent.name}-{item.path.stem}-{slug(prompt)}-seed{seed}.mp4"
    return Video(prompt, int(seed), folder / name)


def _check_same_latents(item: SavedLatents, model: str, variant: Variant) -> None:
    """Refuse latents that this VAE would decode to nonsense."""
    made_by = VARIANTS.get(item.facts["variant"])
    wanted = (variant.z_dim, variant.latents_mean, variant.latents_std)
    if made_by is None or (made_by.z_dim, made_by.latents_mean, made_by.latents_std) != wanted:
        raise ModelError(
            f"{item.path} holds latents of {item.facts['variant']} ({item.facts['model']}), which "
            f"the VAE of {model} ({variant.name}) does not read: pass --model of their own"
        )


def _check_lengths(folder: Path, prompts: Sequence[str]) -> None:
    """Refuse a prompt whose end the text encoder would never see."""
    tokenizer = load_tokenizer(folder)
    for prompt in prompts:
        if (tokens := num_prompt_tokens(tokenizer, prompt)) > MAX_SEQUENCE_LENGTH:
            raise ConfigError(
                f"the prompt {prompt[:60]!r}... has {tokens} tokens; Wan reads at most "
                f"{MAX_SEQUENCE_LENGTH} and would ignore the rest: shorten it"
            )


def _provenance(
    config: SampleConfig,
    model: str,
    adapter: AdapterFile | None,
    settings: wan.VideoSettings,
    device: torch.device,
) -> dict[str, Any]:
    """Record what all videos of this command share: enough to make them again."""
    return {
        "model": model,
        "adapter": str(adapter.path) if adapter else None,
        "adapter_sha256": file_sha256(adapter.path) if adapter else None,
        "scale": config.scale if adapter else None,
        **asdict(settings),
        "fps": config.fps,
        "device": str(device),
        "dtype": str(base_dtype(config.dtype, device)).removeprefix("torch."),
        "versions": {"wanlora": __version__, **wan.versions()},
    }


def _write(video: Video, frames: Any, fps: float, made_with: dict[str, Any]) -> None:
    """Write the record first, so that a video never stands without one."""
    record = {**made_with, "prompt": video.prompt, "seed": video.seed}
    video.path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomic(video.record, text.encode())
    mp4.write(
        video.path, frames, fps=fps, metadata={"title": video.prompt, "comment": json.dumps(record)}
    )
