"""Checks of `evaluate` that need no torch: a mistake is refused before seconds of imports.

Owns: the order of these checks, the choice of held-out clips and the size of the videos. Must not
import torch or diffusers.
"""

import shlex

from wanlora.adapters.header import read_header, split_scale
from wanlora.config import EvaluateConfig
from wanlora.core.buckets import Bucket, problem_with, usual
from wanlora.errors import ConfigError
from wanlora.files import require_folder
from wanlora.report.generated import require_own_page
from wanlora.store.views import View, ViewClip, no_such_split, read_view
from wanlora.training.cached_clips import check_encodings
from wanlora.wan.model_folder import resolve_here
from wanlora.wan.variants import Variant, variant_of

REPORT_NAME = "report.html"


def check(config: EvaluateConfig) -> View:
    """Refuse an output, an adapter, a cache, a size or a model folder that cannot be used.

    A model of the hub is not downloaded here; it is checked when it is.

    Returns:
        The view of the cache.

    Raises:
        WanloraError: Names what cannot be used.
    """
    require_folder(config.output_dir, flag="--output-dir")
    require_own_page(config.output_dir / REPORT_NAME, "evaluate", flag="--output-dir")
    for text in config.adapter:
        read_header(split_scale(text)[0])
    view = read_view(config.cache, config.view)
    video_size(config, held_out_clips(config, view))
    if folder := resolve_here(config.model or view.model, parts_of_model(config)):
        check_model(config, view, variant_of(folder))
    return view


def held_out_clips(config: EvaluateConfig, view: View) -> tuple[ViewClip, ...]:
    """Clips of the split, at least one.

    Raises:
        StoreError: The view has no clips of the split.
    """
    held_out = tuple(clip for clip in view.clips if clip.split == config.split)
    if not held_out:
        raise no_such_split(view, config.split)
    return held_out


def parts_of_model(config: EvaluateConfig) -> list[str]:
    """Sub-folders of the model that are needed."""
    return ["transformer", "vae"] if config.videos_per_activity else ["transformer"]


def check_model(config: EvaluateConfig, view: View, variant: Variant) -> None:
    """Refuse a model that does not read what the cache holds.

    Raises:
        StaleStoreError: Names every field that differs.
    """
    model = config.model or view.model
    words = ["wanlora", "cache-latents", "--cache", str(config.cache), "--model", model]
    words += [] if config.view == "default" else ["--view", config.view]
    check_encodings(view, variant, encode_again=shlex.join(words))


def video_size(config: EvaluateConfig, held_out: tuple[ViewClip, ...]) -> Bucket:
    """Size of the videos: as set, else the most common one of the held-out clips.

    Raises:
        ConfigError: Wan cannot make videos of this size.
    """
    common = usual(clip.bucket for clip in held_out)
    bucket = Bucket(
        config.num_frames or common.num_frames,
        config.height or common.height,
        config.width or common.width,
    )
    if problem := problem_with(bucket):
        raise ConfigError(f"cannot make videos of {problem}")
    return bucket
