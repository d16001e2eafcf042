"""Checks of `sample` that need no torch: a mistake is refused before seconds of imports.

Owns: the order of these checks; the model and the size that the adapters' headers name, and the
files of saved latents. Must not import torch or diffusers.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from wanlora.adapters.header import read_header, split_scale
from wanlora.commands.sample.videos import Video, plan
from wanlora.config import DEFAULT_MODEL, SampleConfig
from wanlora.core.buckets import Bucket, problem_with
from wanlora.errors import ConfigError, RunError
from wanlora.files import require_folder
from wanlora.wan.model_folder import PIPELINE, resolve_here
from wanlora.wan.variants import Variant, variant_of

Provenance = Mapping[str, str]
"""Values that an adapter's header records."""


def check(config: SampleConfig) -> list[Video]:
    """Refuse settings, prompts, outputs, adapters or a model folder that cannot be used.

    A model of the hub is not downloaded here; it is checked when it is.

    Returns:
        The videos to make; none with saved latents.

    Raises:
        WanloraError: Names what cannot be used.
    """
    if config.latents:
        find_latents(config.latents)
        require_folder(config.output_dir, flag="--output-dir")
        return []
    videos = plan(config)
    recorded = [read_header(split_scale(text)[0]).provenance for text in config.adapter]
    if folder := resolve_here(model_of(config, recorded), PIPELINE):
        video_size(config, variant_of(folder), recorded)
    return videos


def model_of(config: SampleConfig, adapters: Sequence[Provenance]) -> str:
    """Select the model: as set, else the one that the adapters' headers name, else the default.

    Raises:
        ConfigError: The headers name several.
    """
    models = {item["model"] for item in adapters if "model" in item}
    if config.model is None and len(models) > 1:
        raise ConfigError(
            f"the adapters were trained on several models ({', '.join(sorted(models))}): pass the "
            "--model to use them with"
        )
    return config.model or (models.pop() if models else DEFAULT_MODEL)


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


def video_size(config: SampleConfig, variant: Variant, adapters: Sequence[Provenance]) -> Bucket:
    """Size of the videos: as set, else that of the adapters' clips, else the variant's.

    Raises:
        ConfigError: Wan cannot take the size; diffusers would round it in silence.
    """
    size = Bucket(variant.num_frames, variant.height, variant.width)
    trained = [trained_on(adapters, name) for name in Bucket._fields]
    if all(trained) and trained[0] != 1:  # clips of one frame are images
        size = Bucket(*(int(value) for value in trained if value))
    given = {name: value for name in Bucket._fields if (value := getattr(config, name)) is not None}
    size = size._replace(**given)
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
