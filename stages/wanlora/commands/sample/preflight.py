"""Checks of `sample` that need no torch: a mistake is refused before seconds of imports.

Owns: the order of these checks; the list of videos to make, with their first frames; the model and
the size that the adapters' headers name; the files of saved latents. Must not import torch or
diffusers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from wanlora.adapters.base_format import format_of_base
from wanlora.adapters.routing import GivenAdapter, read_given, route
from wanlora.commands.sample import prompts, videos
from wanlora.commands.sample.first_frames import ImageFile, read_file
from wanlora.commands.sample.prompts import Request
from wanlora.commands.sample.videos import Video
from wanlora.config import DEFAULT_MODEL, SampleConfig
from wanlora.core import units
from wanlora.core.buckets import Bucket, problem_with
from wanlora.errors import ConfigError, RunError
from wanlora.files import require_folder
from wanlora.store.views import read_view
from wanlora.wan.model_folder import resolve_pipeline_here
from wanlora.wan.variants import Variant, variant_of

Provenance = Mapping[str, str]
"""Values that an adapter's header records."""


def check(config: SampleConfig) -> list[Video]:
    """Refuse settings, prompts, outputs, adapters or a model folder that cannot be used.

    A model of the hub is not downloaded here; it is checked when it is.

    Returns:
        The videos to make; an empty list with saved latents.

    Raises:
        WanloraError: Names what cannot be used.
    """
    if config.latents:
        find_latents(config.latents)
        require_folder(config.output_dir, flag="--output-dir")
        return []
    to_make = plan(config)
    given = given_adapters(config)
    format_of_base(config.quantize, [item.header for item in given], log=False)
    model = model_of(config.model, given)
    if folder := resolve_pipeline_here(model):
        variant = variant_of(folder)
        route(given, variant, model=model)
        to_make = for_model(to_make, variant, model=model)
        video_size(
            variant, recorded_in(given),
            num_frames=config.num_frames, height=config.height, width=config.width,
        )  # fmt: skip
    return to_make


def given_adapters(config: SampleConfig) -> list[GivenAdapter]:
    """Read the headers of the adapters. Raises as `read_given`."""
    return read_given(config.adapter, high=config.adapter_high, low=config.adapter_low)


def recorded_in(given: Sequence[GivenAdapter]) -> list[Provenance]:
    """Values that the header of each adapter records."""
    return [item.header.provenance for item in given]


def plan(config: SampleConfig) -> list[Video]:
    """List the videos: `num_videos` for each prompt, with seeds seed, seed + 1, ...

    Raises:
        ConfigError: The prompts cannot be read, a file exists and may not be replaced, or there are
            several videos for one --output.
        StoreError: The cache has no such view or split.
        OutputError: The folder cannot be written.
    """
    wanted = _assign_prompts(config)
    if config.output is None:
        planned = videos.in_folder(wanted, config.output_dir, config.format)
    else:
        planned = videos.as_file(wanted, config.output, config.format)
    if not config.skip_existing:
        videos.check_new(planned, overwrite=config.overwrite)
    return planned


def for_model(to_make: Sequence[Video], variant: Variant, *, model: str) -> list[Video]:
    """Refuse a first frame that the model does not take, or a video that lacks one.

    Returns:
        The videos; without the frames of cached clips, if the model makes videos from text only.

    Raises:
        ConfigError: Names the flag to pass or to leave out.
    """
    if variant.is_i2v:
        if any(video.image is None for video in to_make):
            raise ConfigError(
                f"{model} ({variant.name}) makes videos from a first frame: pass --image FILE; or "
                '"image" with each prompt of a .jsonl file of --prompts; or --cache CACHE, for the '
                "first frames of its clips"
            )
        return list(to_make)
    for image in (video.image for video in to_make):
        if isinstance(image, ImageFile):
            raise ConfigError(
                f"{image.where} {image.path}: {model} ({variant.name}) makes videos from text "
                "only: leave out the image, or pass an image-to-video --model such as "
                "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
            )
    return [replace(video, image=None) for video in to_make]


def _assign_prompts(config: SampleConfig) -> list[Request]:
    """Collect the prompts with seeds and first frames: of the flags or the cache, then of the file.

    The image of `--image` is that of every prompt, except of those of the file with their own.
    """
    image = read_file(config.image, where="--image") if config.image else None
    number, seed = config.num_videos, config.seed
    if config.cache is None:
        wanted = [
            item for prompt in config.prompt for item in prompts.repeat(prompt, number, seed=seed)
        ]
    else:
        view = read_view(config.cache, config.view)
        wanted = (
            prompts.of_templates(
                config.prompt, view, config.split, number, cache=config.cache, seed=seed
            )
            if config.prompt
            else prompts.of_captions(config.cache, view, config.split, number, seed=seed)
        )
    of_file = prompts.of_file(config.prompts, number, seed=seed) if config.prompts else []
    if image is None:
        return [*wanted, *of_file]
    return [
        *(item._replace(image=image) for item in wanted),
        *(item if item.image else item._replace(image=image) for item in of_file),
    ]


def model_of(model: str | None, given: Sequence[GivenAdapter]) -> str:
    """Select the model: as set, else the one that the adapters' headers name, else the default.

    Args:
        model: The `--model` value.
        given: The adapters.

    Raises:
        ConfigError: The headers name several, or none and a flag names an expert, which the default
            model does not have.
    """
    models = {item["model"] for item in recorded_in(given) if "model" in item}
    if model is None and len(models) > 1:
        raise ConfigError(
            f"the adapters were trained on several models ({', '.join(sorted(models))}): pass the "
            "--model to use them with"
        )
    if model is None and not models and any(item.expert for item in given):
        raise ConfigError(
            f"no header names the model of {units.names([item.text for item in given])}: pass a "
            "--model with two transformers, such as Wan-AI/Wan2.2-T2V-A14B-Diffusers"
        )
    return model or (models.pop() if models else DEFAULT_MODEL)


def trained_on(adapters: Sequence[Provenance], name: str) -> float | None:
    """Positive number that the headers of all adapters agree on, for example their clips' fps.

    None if an adapter has none (0.1.0 and other tools recorded none), or they differ.
    """
    recorded = {item.get(name) for item in adapters}
    try:
        (text,) = recorded
        value = float(text or 0)
    except ValueError:  # several values, or not a number
        return None
    return value if 0 < value < math.inf else None


def video_size(
    variant: Variant,
    adapters: Sequence[Provenance],
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Bucket:
    """Size of the videos: as set, else that of the adapters' clips, else the variant's.

    Args:
        variant: Variant of the model.
        adapters: Values recorded in the header of each adapter.
        num_frames: Frames, if set.
        height: Height in px, if set.
        width: Width in px, if set.

    Raises:
        ConfigError: Wan cannot take the size; diffusers would round it in silence.
    """
    size = Bucket(variant.defaults.num_frames, variant.defaults.height, variant.defaults.width)
    trained = [trained_on(adapters, name) for name in Bucket._fields]
    if all(trained) and trained[0] != 1:  # clips of one frame are images
        size = Bucket(*(int(value) for value in trained if value))
    given = {"num_frames": num_frames, "height": height, "width": width}
    size = size._replace(**{name: value for name, value in given.items() if value is not None})
    if problem := problem_with(size):
        raise ConfigError(f"cannot sample {problem}")
    return size


def find_latents(path: Path) -> list[Path]:
    """List the files of latents in a run's folder, in its previews/ or one step's, or the one file.

    Raises:
        RunError: There are none.
    """
    if path.is_file():
        return [path]
    folder = path / "previews" if (path / "previews").is_dir() else path
    files = sorted(folder.glob("step-*/*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise RunError(
            f"no latents in {path}; expected a run that made previews "
            "(wanlora train --set previews.every=500), or its previews/step-... folder"
        )
    return files
