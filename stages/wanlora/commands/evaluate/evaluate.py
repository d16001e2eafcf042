"""`wanlora evaluate`, in order: check, measure losses, make videos, write the report.

Owns: evaluation.json and report.html. Whatever stops it, the same command continues: losses and
videos that are there are not made again.
"""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wanlora import __version__
from wanlora.adapters.lora import check_adapter_fits
from wanlora.commands.evaluate import losses, videos
from wanlora.commands.evaluate.earlier import require_replaceable
from wanlora.commands.evaluate.measures import against_base, frames_of, measured
from wanlora.commands.evaluate.preflight import REPORT_NAME
from wanlora.commands.evaluate.setup import Setup, open_setup
from wanlora.commands.evaluate.subjects import BASE, Subject, subjects
from wanlora.commands.evaluate.video_plan import Model, describe, plan, plan_clips
from wanlora.config import EvaluateConfig
from wanlora.core.intervals import conclusion, describe_sample
from wanlora.core.units import count
from wanlora.files import require_folder, write_text
from wanlora.media import mp4
from wanlora.progress import waiting
from wanlora.report.evaluation_page import Shown, evaluation_page
from wanlora.report.generated import marked
from wanlora.store.views import View
from wanlora.wan.attention import pinned
from wanlora.wan.transformer import load_transformer

EVALUATION_NAME = "evaluation.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateResult:
    """What was found, as in evaluation.json."""

    report: str
    evaluation: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """Always 0: an adapter that is worse than the base is a finding, not a failure."""
        return 0

    def lines(self) -> list[str]:
        """Say each adapter's difference in a line, and where the report is."""
        lines = [say(item["name"], item["validation"]) for item in self.evaluation["adapters"]]
        return [*lines, f"report: {self.report}"]


def run(config: EvaluateConfig, view: View) -> EvaluateResult:
    """Compare the base model with every adapter, by loss and by videos.

    Args:
        config: The settings.
        view: The cache's view, from `preflight.check`.

    Raises:
        WanloraError: A setting, the cache, the device, the model or an adapter does not do.
    """
    base_dir = config.base_videos or config.output_dir.absolute().parent / "base-videos"
    compared = subjects(config.adapter, checkpoints=config.checkpoints)
    setup = open_setup(config, view)
    has_videos = require_replaceable(
        config.output_dir / EVALUATION_NAME,
        _question(config, setup),
        [(item.scaled.sha256, item.scaled.scale) for item in compared],
    )
    models = plan(
        setup,
        compared,
        num_videos=config.videos_per_activity,
        base_dir=base_dir,
        output_dir=config.output_dir,
    )
    if config.videos_per_activity:
        require_folder(base_dir, flag="--set base_videos")
        logger.info("%s", describe(setup, models))
    logger.info(
        "to compare: %s with the base model, on %s at %s", count(len(compared), "adapter"),
        count(len(setup.panel.clips), "held-out clip"),
        count(len(setup.panel.sigmas), "noise level"),
    )  # fmt: skip
    config.output_dir.mkdir(parents=True, exist_ok=True)
    load = functools.cache(lambda: _load(setup, compared))
    with pinned("auto", setup.device):  # the kernel that training takes: its losses, and its speed
        base, others = losses.tables(setup, compared, config.output_dir, load)
        found = _evaluation(config, setup, compared, base, others)
        if not has_videos:
            _write(config, found, [])  # hours before the videos are there
        if config.videos_per_activity:
            for item in found["adapters"]:
                logger.info("%s", say(item["name"], item["validation"]))
            videos.make(setup, models, load)
    if config.videos_per_activity:
        shown = _with_clips(config, setup, models)
        found = _with_videos(found, shown)
        _write(config, found, _shown(config, shown))
    return EvaluateResult(str(config.output_dir / REPORT_NAME), found)


def _with_clips(config: EvaluateConfig, setup: Setup, models: Sequence[Model]) -> dict[str, Model]:
    """The real clips, where they compare, before the models; the first of these is the base."""
    clips = plan_clips(
        setup,
        num_videos=config.videos_per_activity,
        output_dir=config.output_dir,
    )
    if clips:
        videos.decode_clips(setup, clips)
    return {model.name: model for model in ([clips, *models] if clips else models)}


def _load(setup: Setup, compared: Sequence[Subject]) -> Any:
    """Load the transformer, and refuse an adapter that is not for it before hours of work."""
    with waiting(f"loading the transformer in {setup.folder}"):
        transformer = load_transformer(setup.folder, dtype=setup.dtype, device=setup.device)
    for item in compared:
        check_adapter_fits(item.scaled.adapter, transformer)
    return transformer


def say(name: str, validation: Mapping[str, Any]) -> str:
    """An adapter's loss and its difference to the base's, in one line."""
    base, interval = validation["base"], validation["ci95"]
    change = 100 * validation["paired_difference"] / base
    sample = describe_sample(validation["clips"], validation["source_groups"])
    line = f"{name}: held-out loss {validation['adapter']:.4f}, base {base:.4f} ({change:+.2f} %"
    if interval is None:
        return f"{line}; {sample})"
    low, high = (100 * end / base for end in interval)
    verdict = conclusion(interval, validation["source_groups"])
    return f"{line}, 95 % interval {low:+.2f} to {high:+.2f} %: {verdict}; {sample})"


def _evaluation(
    config: EvaluateConfig,
    setup: Setup,
    compared: Sequence[Subject],
    base: losses.Table,
    others: Sequence[losses.Table],
) -> dict[str, Any]:
    """Losses, as evaluation.json has them."""
    found = [losses.compare(setup.panel, table, base, name="base") for table in others]
    best = min(range(len(others)), key=lambda index: float(found[index]["adapter"]))
    adapters = [
        {
            "name": item.name,
            "run": item.run,
            **item.scaled.record,
            "step": item.step,
            "validation": validation,
            "against_best": losses.compare(setup.panel, table, others[best], name="best"),
        }
        for item, table, validation in zip(compared, others, found, strict=True)
    ]
    return {
        **_question(config, setup),
        "best": compared[best].name,
        "validation": adapters[0]["validation"],
        "adapters": adapters,
        "videos": None,
    }


def _question(config: EvaluateConfig, setup: Setup) -> dict[str, Any]:
    """Fields of evaluation.json that are known before anything is measured."""
    return {
        "wanlora": __version__,
        "model": setup.model,
        "cache": str(config.cache),
        "view": config.view,
        "seed": config.seed,
        **setup.facts,
        "split": config.split,
        "clips": [clip.clip_id for clip in setup.panel.clips],
        "sigmas": list(setup.panel.sigmas),
        "video_settings": {
            "size": list(setup.bucket),
            "steps": setup.steps,
            "guidance_scale": setup.guidance_scale,
            "shift": setup.source.shift,
            "fps": setup.fps,
            "videos_per_activity": config.videos_per_activity,
        },
    }


def _with_videos(found: dict[str, Any], models: Mapping[str, Model]) -> dict[str, Any]:
    """Add what is said of the videos, and where each of them is."""
    base = models[BASE]
    listed = [
        {
            "activity": video.activity,
            "prompt": video.prompt,
            "seed": video.seed,
            "files": {name: str(model.videos[number].path) for name, model in models.items()},
        }
        for number, video in enumerate(base.videos)
    ]
    measures = {
        "per_activity": {name: measured(model) for name, model in models.items()},
        "against_base": {
            name: against_base(model, base) for name, model in models.items() if model.subject
        },
    }
    return found | {"videos": {"measures": measures, "list": listed}}


def _shown(config: EvaluateConfig, models: Mapping[str, Model]) -> list[Shown]:
    """The first few videos of each activity, small enough for a page."""
    shown: list[Shown] = []
    taken: dict[str, int] = {}
    for number, video in enumerate(models[BASE].videos):
        taken[video.activity] = taken.get(video.activity, 0) + 1
        if taken[video.activity] > config.shown_per_activity or len(shown) >= config.html_clips:
            continue
        small = {
            name: mp4.small(
                frames_of(model.videos[number]),
                fps=model.videos[number].facts["fps"],
                height=config.shown_height,
            )
            for name, model in models.items()
        }
        shown.append(Shown(video.activity, video.prompt, video.seed, small))
    return shown


def _write(config: EvaluateConfig, found: dict[str, Any], shown: Sequence[Shown]) -> None:
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(config.output_dir / EVALUATION_NAME, text)
    page = marked(evaluation_page(found, shown), "evaluate")
    write_text(config.output_dir / REPORT_NAME, page)
