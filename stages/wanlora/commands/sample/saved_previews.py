"""`wanlora sample --latents`: decode the previews of a run with the VAE.

Owns: the file of each video, and the check that this VAE made the latents.
"""

from pathlib import Path

import torch

from wanlora import progress
from wanlora.commands.sample.preflight import find_latents
from wanlora.commands.sample.videos import Video, check_new, record_of
from wanlora.core.buckets import DEFAULT_FPS
from wanlora.core.prompts import slug
from wanlora.errors import ConfigError, ModelError
from wanlora.media import recorded
from wanlora.runs.saved_latents import SavedLatents, read_latents
from wanlora.wan.device import select_device
from wanlora.wan.encoders import decode_latents, load_vae
from wanlora.wan.model_folder import resolve
from wanlora.wan.pipeline import versions
from wanlora.wan.variants import VARIANTS, Variant, variant_of


def decode(
    source: Path,
    *,
    model: str | None,
    output_dir: Path,
    overwrite: bool,
    fps: float | None,
    device: str,
) -> tuple[str, list[Video]]:
    """Decode saved latents with the VAE of the model that made them.

    Args:
        source: A run's folder, its `previews/`, one step's folder, or one file.
        model: The `--model` value; None = the model recorded with the latents.
        output_dir: Folder for the videos.
        overwrite: True to replace existing videos.
        fps: Frames per second; None = those recorded with the latents.
        device: The `--device` value.

    Returns:
        The model and the videos.

    Raises:
        WanloraError: There are no latents, they are of several models, or of another VAE.
    """
    saved = [read_latents(file) for file in find_latents(source)]
    videos = [_video_of(item, output_dir) for item in saved]
    check_new(videos, overwrite=overwrite)
    models = {item.facts["model"] for item in saved}
    if model is None and len(models) > 1:
        raise ConfigError(
            f"{source} holds latents of {', '.join(sorted(models))}: pass one model's"
        )
    model = model or models.pop()
    place = select_device(device, model)
    folder = resolve(model, ["vae"])
    for item in saved:
        _check_same_latents(item, model, variant_of(folder))
    vae = load_vae(folder, dtype=torch.float32, device=place, tf32=True)
    with progress.bar(total=len(saved), description="decode", unit="video") as bar:
        for item, video in zip(saved, videos, strict=True):
            frames = decode_latents(vae, item.latents[None])[0].cpu().numpy()
            rate = fps or float(item.facts.get("fps", DEFAULT_FPS))
            facts = {**item.facts, "versions": versions(), "fps": rate}
            record = record_of(video, {"latents": str(item.path), **facts})
            recorded.write(video.path, frames, record=record)
            bar.update()
    return model, videos


def _video_of(item: SavedLatents, folder: Path) -> Video:
    prompt, seed = item.facts["prompt"], item.facts["seed"]
    name = f"{item.path.parent.name}-{item.path.stem}-{slug(prompt)}-seed{seed}.mp4"
    return Video(prompt, int(seed), folder / name)


def _check_same_latents(item: SavedLatents, model: str, variant: Variant) -> None:
    """Refuse latents that this VAE would decode to nonsense."""
    made_by = VARIANTS.get(item.facts["variant"])
    if made_by is None or made_by.vae != variant.vae:
        raise ModelError(
            f"{item.path} holds latents of {item.facts['variant']} ({item.facts['model']}), which "
            f"the VAE of {model} ({variant.name}) cannot decode: pass their model with --model"
        )
