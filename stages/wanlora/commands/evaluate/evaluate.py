"""`wanlora evaluate`, in order: check, measure losses, make videos, write the report.

Owns: evaluation.json and report.html. After an interruption the same command continues: losses and
videos that exist are not made again.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora.commands.evaluate import findings, losses, videos
from wanlora.commands.evaluate.earlier import require_replaceable
from wanlora.commands.evaluate.measures import frames_of
from wanlora.commands.evaluate.preflight import REPORT_NAME
from wanlora.commands.evaluate.setup import Setup, open_setup
from wanlora.commands.evaluate.subjects import BASE, REAL, Subject, subjects
from wanlora.commands.evaluate.transformers import Transformers
from wanlora.commands.evaluate.video_plan import Model, describe, plan, plan_clips
from wanlora.config import EvaluateConfig
from wanlora.core.units import count, names
from wanlora.files import require_folder, write_text
from wanlora.media import mp4
from wanlora.report.evaluation_page import Shown, evaluation_page
from wanlora.report.generated import marked
from wanlora.store.views import View
from wanlora.wan.attention import pinned

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
        """Format the losses, and the path of the report."""
        return [*findings.lines(self.evaluation), f"report: {self.report}"]


def run(config: EvaluateConfig, view: View) -> EvaluateResult:
    """Compare the base model with every adapter, by loss and by videos.

    Args:
        config: The settings.
        view: The cache's view, from `preflight.check`.

    Raises:
        WanloraError: A setting, the cache, the device, the model or an adapter cannot be used.
    """
    setup, experts = open_setup(config, view)
    words = (*config.adapter, *config.adapter_high, *config.adapter_low)
    compared = subjects(words, experts, checkpoints=config.checkpoints)
    output_dir = config.output_dir
    has_videos = require_replaceable(
        output_dir / EVALUATION_NAME,
        findings.question(setup),
        [(item.scaled.sha256, item.scaled.scale) for item in compared],
    )
    base_dir = config.base_videos or output_dir.absolute().parent / "base-videos"
    models = plan(setup, compared, base_dir=base_dir, output_dir=output_dir)
    if setup.num_videos:
        require_folder(base_dir, flag="--set base_videos")
        logger.info("%s", describe(setup, models))
    _log_plan(setup, compared)
    output_dir.mkdir(parents=True, exist_ok=True)
    transformers = Transformers(setup, compared)
    with pinned("auto", setup.device):  # the kernel that training takes: its losses, and its speed
        tables = [
            losses.tables(setup, item, compared, output_dir, transformers) for item in setup.ranges
        ]
        found = findings.evaluation(setup, compared, tables)
        if not has_videos:
            _write(output_dir, found, [])  # hours before the videos exist
        if setup.num_videos:
            for line in findings.lines(found):
                logger.info("%s", line)
            videos.make(setup, models, transformers)
    if setup.num_videos:
        compared_videos = _with_clips(setup, models, output_dir)
        found = findings.with_videos(found, compared_videos)
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


def _log_plan(setup: Setup, compared: Sequence[Subject]) -> None:
    """Log the number of adapters, clips and noise levels, and the range of each expert."""
    logger.info(
        "to compare: %s with the base model, on %s at %s", count(len(compared), "adapter"),
        count(len(setup.clips), "held-out clip"), count(len(setup.sigmas), "noise level"),
    )  # fmt: skip
    for subject in compared:
        _warn_of_density(setup, subject)
    if not setup.is_pair:
        return
    for item in setup.ranges:
        own = [subject.name for subject in compared if subject.expert == item.part.expert]
        logger.info("%s: %s", item.name, names(own))
    if len(setup.ranges) == 1:
        logger.info("the other expert has no adapter: it is the base model's")


def _warn_of_density(setup: Setup, subject: Subject) -> None:
    """Log that an adapter was trained with another density than that of the losses."""
    trained = subject.scaled.adapter.provenance
    different = [
        f"{name} {trained[name]}, and the losses here have {value} (--set {name}=...)"
        for name, value in setup.density.items()
        if trained.get(name, value) != value
    ]
    if different:
        logger.warning("%s was trained with %s", subject.name, "; ".join(different))


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
        first = frames_of(models[REAL].videos[number])[0] if video.start else None
        shown.append(Shown(video.activity, video.prompt, video.seed, small, first))
    return shown


def _write(folder: Path, found: dict[str, Any], shown: Sequence[Shown]) -> None:
    """Write evaluation.json and the report."""
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(folder / EVALUATION_NAME, text)
    page = marked(evaluation_page(found, shown), "evaluate")
    write_text(folder / REPORT_NAME, page)
