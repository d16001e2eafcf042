"""Checks of `evaluate` that need no torch: a mistake is refused before seconds of imports.

Owns: the order of these checks, the choice of held-out clips and the size of the videos. Must not
import torch or diffusers.
"""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace

from wanlora.adapters.base_format import format_of_base
from wanlora.adapters.routing import GivenAdapter, read_given, route
from wanlora.config import EvaluateConfig
from wanlora.core import units
from wanlora.core.buckets import Bucket, problem_with, usual
from wanlora.core.location import Location
from wanlora.errors import AdapterError, ConfigError
from wanlora.files import require_folder
from wanlora.report.generated import require_own_page
from wanlora.store.views import View, ViewClip, no_such_split, read_view
from wanlora.training.cached_clips import check_encodings
from wanlora.wan.model_folder import resolve_here
from wanlora.wan.variants import Expert, Variant, variant_of

logger = logging.getLogger(__name__)

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
    given = given_adapters(config)
    format_of_base(config.quantize, [item.header for item in given], log=False)
    view = read_view(config.cache, config.view)
    size = video_size(
        held_out_clips(view, config.split),
        num_frames=config.num_frames, height=config.height, width=config.width,
    )  # fmt: skip
    model = config.model or view.model
    if folder := resolve_here(model, ()):
        variant = variant_of(folder, any_expert(given))
        check_model(view, variant, cache=config.cache, model=model)
        experts = experts_of(given, variant, model=model)
        variant.guidance_scales(config.guidance_scale, config.guidance_scale_low)
        if config.videos_per_activity:
            clips_to_start_from(view, variant, size, split=config.split)
        resolve_here(model, parts_of_model(variant, experts, videos=config.videos_per_activity > 0))
    return view


def given_adapters(config: EvaluateConfig) -> list[GivenAdapter]:
    """Read the headers of the adapters to compare. Raises as `read_given`."""
    return read_given(config.adapter, high=config.adapter_high, low=config.adapter_low)


def any_expert(given: Sequence[GivenAdapter]) -> Expert | None:
    """Expert that one of the adapters is for; None if they are for a model with one transformer."""
    return next((expert for item in given if (expert := item.header.expert or item.expert)), None)


def experts_of(
    given: Sequence[GivenAdapter], variant: Variant, *, model: str
) -> list[Expert | None]:
    """Select the expert of each adapter; None for each in a model with one transformer.

    Args:
        given: Adapters of the command line.
        variant: Variant of the model.
        model: The `--model` value, for messages.

    Raises:
        AdapterError: See `route`; or an expert has two adapters, which `evaluate` does not join.
    """
    for part in variant.transformers if variant.boundary is not None else ():
        same = [item.text for item in given if (item.header.expert or item.expert) == part.expert]
        if len(same) > 1:
            raise AdapterError(
                f"{len(same)} adapters are for the {part.expert}-noise expert of {model}: "
                f"{units.names(same)}; expected one for each expert. Compare the others in an "
                "evaluation of their own, with another --output-dir"
            )
    return route(given, variant, model=model)


def held_out_clips(view: View, split: str) -> tuple[ViewClip, ...]:
    """Clips of the split, at least one.

    Raises:
        StoreError: The view has no clips of the split.
    """
    held_out = tuple(clip for clip in view.clips if clip.split == split)
    if not held_out:
        raise no_such_split(view, split)
    return held_out


def parts_of_model(
    variant: Variant, experts: Sequence[Expert | None], *, videos: bool
) -> list[str]:
    """Sub-folders of the model that are needed.

    Args:
        variant: Variant of the model.
        experts: Experts that are compared. Videos need all transformers.
        videos: True if videos are made.
    """
    parts = [part.subfolder for part in variant.transformers if videos or part.expert in experts]
    return [*parts, "vae"] if videos else parts


def check_model(view: View, variant: Variant, *, cache: Location, model: str) -> None:
    """Refuse a model that cannot use the contents of the cache.

    Args:
        view: View of the cache.
        variant: Variant of the model.
        cache: The `--cache` value, for the command in the message.
        model: The `--model` value.

    Raises:
        StaleStoreError: Names every field that differs.
    """
    words = ["wanlora", "cache-latents", "--cache", str(cache), "--model", model]
    words += [] if view.name == "default" else ["--view", view.name]
    check_encodings(view, variant, encode_again=shlex.join(words))


def video_size(
    held_out: Sequence[ViewClip],
    *,
    num_frames: int | None,
    height: int | None,
    width: int | None,
) -> Bucket:
    """Size of the videos: as set, else the most common one of the held-out clips.

    Args:
        held_out: At least one clip.
        num_frames: Frames, if set.
        height: Height in px, if set.
        width: Width in px, if set.

    Raises:
        ConfigError: Wan cannot make videos of this size.
    """
    common = usual(clip.bucket for clip in held_out)
    bucket = Bucket(num_frames or common.num_frames, height or common.height, width or common.width)
    if problem := problem_with(bucket):
        raise ConfigError(f"cannot make videos of {problem}")
    return bucket


def clips_to_start_from(view: View, variant: Variant, size: Bucket, *, split: str) -> View:
    """Leave out the clips whose cached first frame is not of the videos' size.

    Args:
        view: View of the cache.
        variant: Variant of the model; a text-to-video model needs no first frames.
        size: Size of the videos.
        split: Split of the captions that are the prompts.

    Returns:
        The view whose captions are the prompts.

    Raises:
        ConfigError: No clip of the split has the size.
    """
    if not variant.is_i2v:
        return view
    fitting = tuple(clip for clip in view.clips if contains(clip.bucket, size))
    if not any(clip.split == split for clip in fitting):
        common = usual(clip.bucket for clip in held_out_clips(view, split))
        raise ConfigError(
            f"no {split} clip gives a first frame for videos of {size}; the most common size is "
            f"{common}: leave out --num-frames, --height and --width, or pass "
            "--videos-per-activity 0 for the loss alone"
        )
    activities = {clip.activity for clip in view.clips}
    if lost := sorted(activities - {clip.activity for clip in fitting}):
        logger.warning(
            "no videos of %s: all clips have another size than the videos (%s)",
            units.names(lost), size,
        )  # fmt: skip
    return replace(view, clips=fitting)


def contains(clip: Bucket, video: Bucket) -> bool:
    """Return whether the first frames of a clip have the size of a video."""
    return clip.num_frames >= video.num_frames and clip[1:] == video[1:]
