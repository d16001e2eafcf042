"""Videos of an evaluation: prompts, files, and the FLOPs to make them.

Owns: the names of the files. A name ends in a fingerprint of everything that its pixels depend on,
so a video that exists is never made again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora.commands.evaluate.preflight import contains
from wanlora.commands.evaluate.setup import Setup
from wanlora.commands.evaluate.subjects import BASE, REAL, Subject
from wanlora.core import units
from wanlora.core.buckets import num_tokens
from wanlora.core.fingerprint import fingerprint
from wanlora.core.prompts import PromptAssignment, assign_prompts, slug
from wanlora.cost.flops import step_flops
from wanlora.media import recorded
from wanlora.store.captions import clips_of
from wanlora.store.views import ViewClip


@dataclass(frozen=True, slots=True)
class Video:
    """One video of one model, or a cached clip as the VAE decodes it.

    Attributes:
        activity: Activity of the prompt.
        prompt: The prompt.
        prompt_key: Key of the prompt's embedding.
        seed: Seed of the noise.
        path: The file.
        facts: Everything that the pixels depend on; the file name ends in its fingerprint.
        clip: The clip to decode; None = made from noise.
        start: Clip whose first frame the video starts from, with an image-to-video model.
    """

    activity: str
    prompt: str
    prompt_key: str
    seed: int
    path: Path
    facts: Mapping[str, Any]
    clip: ViewClip | None = None
    start: ViewClip | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """The base, or the base with an adapter in a transformer or in each, and its videos.

    The real clips count as one more model: the ideal result.
    """

    name: str
    subjects: tuple[Subject, ...]
    videos: tuple[Video, ...]

    @property
    def missing(self) -> list[Video]:
        """Videos without a complete file, each once."""
        unique = {video.path: video for video in self.videos}
        return [video for video in unique.values() if recorded.read_record(video.path) is None]


def plan(
    setup: Setup, subjects: Sequence[Subject], *, base_dir: Path, output_dir: Path
) -> list[Model]:
    """Plan the videos of each activity by each model, the base first.

    In a model with two transformers, the adapters that the command line names are one model.

    Args:
        setup: Values that are the same for all models.
        subjects: The adapters.
        base_dir: Folder for the base model's videos, which other evaluations use again.
        output_dir: Folder of the evaluation.
    """
    assigned = _assigned(setup)
    starts: Sequence[ViewClip | None] = [None] * len(assigned)
    if setup.variant.is_i2v:
        starts = _clips_of(setup, assigned)

    def of(name: str, own: tuple[Subject, ...], folder: Path) -> Model:
        videos = []
        for item, start in zip(assigned, starts, strict=True):
            key = setup.prompts[item.activity][item.prompt]
            facts = _facts(setup, own, key, item.seed)
            if start:
                facts["first_frame"] = start.key
            place = folder / slug(item.activity or "all")
            file = f"{slug(item.prompt)}-seed{item.seed}-{fingerprint(facts)[:12]}.mp4"
            videos.append(
                Video(item.activity, item.prompt, key, item.seed, place / file, facts, start=start)
            )
        return Model(name, own, tuple(videos))

    models: dict[str, tuple[Subject, ...]] = {item.name: (item,) for item in subjects}
    if setup.is_pair:
        together = tuple(item for item in subjects if item.named)
        models = {" and ".join(item.name for item in together): together}
    folder = output_dir / "videos"
    adapted = [of(name, own, folder / slug(name)) for name, own in models.items()]
    return [of(BASE, (), base_dir), *adapted]


def plan_clips(setup: Setup, *, output_dir: Path) -> Model | None:
    """Plan the clips whose captions are the prompts, in the same order.

    They have as many frames as the videos. None if a clip is shorter, or of another height or width
    than the videos: they could not be compared.
    """
    videos = []
    assigned = _assigned(setup)
    for item, clip in zip(assigned, _clips_of(setup, assigned), strict=True):
        key = setup.prompts[item.activity][item.prompt]
        if not contains(clip.bucket, setup.bucket):
            return None
        facts = {"clip": clip.key, "latents": setup.view.fingerprint("latents"),
                 "vae": setup.weights["vae"], "size": list(setup.bucket),
                 "fps": setup.fps}  # fmt: skip
        place = output_dir / "videos" / slug(REAL) / slug(item.activity or "all")
        file = f"{slug(clip.clip_id)}-{fingerprint(facts)[:12]}.mp4"
        videos.append(
            Video(item.activity, item.prompt, key, item.seed, place / file, facts, clip=clip)
        )
    return Model(REAL, (), tuple(videos))


def _assigned(setup: Setup) -> list[PromptAssignment]:
    prompts = {activity: list(texts) for activity, texts in setup.prompts.items()}
    return assign_prompts(prompts, setup.num_videos, seed=setup.source.seed)


def _clips_of(setup: Setup, assigned: Sequence[PromptAssignment]) -> list[ViewClip]:
    """Select the clip of each prompt: a held-out one with this caption, if there is one."""
    wanted = [(item.activity, setup.prompts[item.activity][item.prompt]) for item in assigned]
    return clips_of(setup.captioned, setup.split, wanted)


def _facts(
    setup: Setup, subjects: tuple[Subject, ...], prompt_key: str, seed: int
) -> dict[str, Any]:
    files = {item.expert: [item.scaled.sha256, item.scaled.scale] for item in subjects}
    guided = passes(setup) > 1
    facts = {
        **setup.facts,
        "adapter": files if setup.is_pair else files.get(None),
        "prompt_key": prompt_key,
        "negative_prompt_key": setup.view.negative_prompt if guided else None,
        "seed": seed,
        "size": list(setup.bucket),
        "steps": setup.steps,
        "guidance_scale": setup.guidance_scales[0],
        "shift": setup.source.shift,
        "fps": setup.fps,
    }
    return {**facts, "guidance_scale_low": setup.guidance_scales[1]} if setup.is_pair else facts


def describe(setup: Setup, models: Sequence[Model]) -> str:
    """Format the number of videos to make, and their FLOPs."""
    todo = [(model, len(model.missing)) for model in models]
    flops = sum(number * video_flops(setup, model.subjects) for model, number in todo)
    number = sum(number for _, number in todo)
    total = sum(len(model.videos) for model in models)
    return (
        f"{total} videos of {setup.bucket} ({len(models)} models x {len(models[0].videos)}), "
        f"{total - number} there already; {number} to make: {setup.steps} steps x "
        f"{passes(setup)} forward passes each, {units.flops(flops)} in all"
    )


def passes(setup: Setup) -> int:
    """Forward passes of a denoising step: with guidance, two."""
    return 2 if setup.guidance_scales[0] > 1 else 1


def video_flops(setup: Setup, subjects: Sequence[Subject]) -> float:
    """FLOPs of one video's forward passes; the VAE is not counted.

    Args:
        setup: Values that are the same for all models.
        subjects: Adapters of the model. With two transformers, every step counts the larger one.
    """
    tensors = {
        name: tensor for item in subjects for name, tensor in item.scaled.adapter.tensors.items()
    }
    ranks = [len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight")]
    counted = step_flops(
        setup.variant.shape,
        num_tokens(setup.bucket),
        rank=max(ranks, default=0),
        adapted={name.partition(".lora_")[0] for name in tensors},
    )
    return counted.forward.total * setup.steps * passes(setup)
