"""`wanlora evaluate`, in order: check, measure losses, make videos, write the report.

Owns: evaluation.json and report.html. After an interruption the same command continues: losses and
videos that exist are not made again.
"""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from wanlora.core.intervals import conclusion, describe_change, describe_sample
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
    """Path of the report, and the content of evaluation.json."""

    report: str
    evaluation: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """Always 0: an adapter that is worse than the base is a finding, not a failure."""
        return 0

    def lines(self) -> list[str]:
        """Format a line for each adapter, and the path of the report."""
        lines = [
            loss_line(item["name"], item["validation"]) for item in self.evaluation["adapters"]
        ]
        return [*lines, f"report: {self.report}"]


def run(config: EvaluateConfig, view: View) -> EvaluateResult:
    """Compare the base model with every adapter, by loss and by videos.

    Args:
        config: The settings.
        view: The cache's view, from `preflight.check`.

    Raises:
        WanloraError: A setting, the cache, the device, the model or an adapter cannot be used.
    """
    compared = subjects(config.adapter, checkpoints=config.checkpoints)
    setup = open_setup(config, view)
    output_dir = config.output_dir
    has_videos = require_replaceable(
        output_dir / EVALUATION_NAME,
        _question(setup),
        [(item.scaled.sha256, item.scaled.scale) for item in compared],
    )
    base_dir = config.base_videos or output_dir.absolute().parent / "base-videos"
    models = plan(setup, compared, base_dir=base_dir, output_dir=output_dir)
    if setup.num_videos:
        require_folder(base_dir, flag="--set base_videos")
        logger.info("%s", describe(setup, models))
    logger.info(
        "to compare: %s with the base model, on %s at %s", count(len(compared), "adapter"),
        count(len(setup.panel.clips), "held-out clip"),
        count(len(setup.panel.sigmas), "noise level"),
    )  # fmt: skip
    output_dir.mkdir(parents=True, exist_ok=True)
    load = functools.cache(lambda: _load(setup, compared))
    with pinned("auto", setup.device):  # the kernel that training takes: its losses, and its speed
        found = _evaluation(setup, compared, *losses.tables(setup, compared, output_dir, load))
        if not has_videos:
            _write(output_dir, found, [])  # hours before the videos exist
        if setup.num_videos:
            for item in found["adapters"]:
                logger.info("%s", loss_line(item["name"], item["validation"]))
            videos.make(setup, models, load)
    if setup.num_videos:
        compared_videos = _with_clips(setup, models, output_dir)
        found = _with_videos(found, compared_videos)
        shown = _shown(
            compared_videos, per_activity=config.shown_per_activity, at_most=config.html_clips,
            height=config.shown_height,
        )  # fmt: skip
        _write(output_dir, found, shown)
    return EvaluateResult(str(output_dir / REPORT_NAME), found)


def _with_clips(setup: Setup, models: Sequence[Model], output_dir: Path) -> dict[str, Model]:
    """Models by name, the base first; before it the real clips, if they have the videos' size."""
    clips = plan_clips(setup, output_dir=output_dir)
    if clips:
        videos.decode_clips(setup, clips)
    return {model.name: model for model in ([clips, *models] if clips else models)}


def _load(setup: Setup, compared: Sequence[Subject]) -> Any:
    """Load the transformer, and check that every adapter fits it before hours of work."""
    with waiting(f"loading the transformer in {setup.folder}"):
        transformer = load_transformer(setup.folder, dtype=setup.dtype, device=setup.device)
    for item in compared:
        check_adapter_fits(item.scaled.adapter, transformer)
    return transformer


def loss_line(name: str, validation: Mapping[str, Any]) -> str:
    """Format an adapter's loss and its difference from the base's."""
    base, interval = validation["base"], validation["ci95"]
    change = describe_change(validation["paired_difference"], base, interval)
    sample = describe_sample(validation["clips"], validation["source_groups"])
    line = f"{name}: held-out loss {validation['adapter']:.4f}, base {base:.4f} ({change}"
    if interval is None:
        return f"{line}; {sample})"
    return f"{line}: {conclusion(interval, validation['source_groups'])}; {sample})"


def _evaluation(
    setup: Setup, compared: Sequence[Subject], base: losses.Table, others: Sequence[losses.Table]
) -> dict[str, Any]:
    """Build the content of evaluation.json without videos.

    Args:
        setup: Values that are the same for all models.
        compared: The adapters.
        base: Losses of the base model.
        others: Losses of each adapter.
    """
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
        **_question(setup),
        "best": compared[best].name,
        "validation": adapters[0]["validation"],
        "adapters": adapters,
        "videos": None,
    }


def _question(setup: Setup) -> dict[str, Any]:
    """Fields of evaluation.json that are known before anything is measured."""
    return {
        "wanlora": __version__,
        "model": setup.model,
        "cache": str(setup.cache),
        "view": setup.view.name,
        "seed": setup.source.seed,
        **setup.facts,
        "split": setup.panel.name,
        "clips": [clip.clip_id for clip in setup.panel.clips],
        "sigmas": list(setup.panel.sigmas),
        "video_settings": {
            "size": list(setup.bucket),
            "steps": setup.steps,
            "guidance_scale": setup.guidance_scale,
            "shift": setup.source.shift,
            "fps": setup.fps,
            "videos_per_activity": setup.num_videos,
        },
    }


def _with_videos(found: dict[str, Any], models: Mapping[str, Model]) -> dict[str, Any]:
    """Add the measures of the videos and the path of each video."""
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


def _shown(
    models: Mapping[str, Model], *, per_activity: int, at_most: int, height: int
) -> list[Shown]:
    """Compress the first few videos of each activity for the report.

    Args:
        models: Models with videos of the same prompts, by name.
        per_activity: Maximum number of prompts of an activity.
        at_most: Maximum number of prompts in all.
        height: Maximum height in px.
    """
    shown: list[Shown] = []
    taken: dict[str, int] = {}
    for number, video in enumerate(models[BASE].videos):
        taken[video.activity] = taken.get(video.activity, 0) + 1
        if taken[video.activity] > per_activity or len(shown) >= at_most:
            continue
        small = {
            name: mp4.small(
                frames_of(model.videos[number]),
                fps=model.videos[number].facts["fps"],
                height=height,
            )
            for name, model in models.items()
        }
        shown.append(Shown(video.activity, video.prompt, video.seed, small))
    return shown


def _write(folder: Path, found: dict[str, Any], shown: Sequence[Shown]) -> None:
    """Write evaluation.json and the report."""
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(folder / EVALUATION_NAME, text)
    page = marked(evaluation_page(found, shown), "evaluate")
    write_text(folder / REPORT_NAME, page)
