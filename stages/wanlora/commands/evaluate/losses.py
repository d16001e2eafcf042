"""Loss of each model on the same clips, sigmas and noise, and comparisons of the losses.

Owns: `losses.json`, and the figures of evaluation.json made from it. The arithmetic is that of
training's validation.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from wanlora import progress
from wanlora.adapters.attach import attach, detach
from wanlora.commands.evaluate.setup import Range, Setup
from wanlora.commands.evaluate.subjects import Subject
from wanlora.commands.evaluate.transformers import Transformers
from wanlora.core.fingerprint import fingerprint
from wanlora.errors import RunError
from wanlora.files import write_json
from wanlora.training.panel import Report, summarize
from wanlora.training.validation import Panel, losses, require_finite

TABLES_NAME = "losses.json"

Table = Float[np.ndarray, "n q"]


def tables(
    setup: Setup,
    item: Range,
    subjects: Sequence[Subject],
    folder: Path,
    transformers: Transformers,
) -> tuple[Table, list[Table]]:
    """Losses of the base and of each adapter of a transformer, on its range.

    Those in `losses.json` are not measured again. Only this transformer is in memory.

    Args:
        setup: Values that are the same for all models.
        item: The transformer with its range.
        subjects: All adapters; those of other transformers are left out.
        folder: Folder with `losses.json`.
        transformers: Loads the transformer, if a table is missing.

    Raises:
        NonFiniteError: A loss is NaN or infinite.
        RunError: `losses.json` is damaged.
    """
    path = folder / TABLES_NAME
    known = _read(path)
    own = [subject for subject in subjects if subject.expert == item.part.expert]
    models: list[Subject | None] = [None, *own]
    keys = [_key(setup, item, model) for model in models]
    todo = {key: model for key, model in zip(keys, models, strict=True) if key not in known}
    if todo:
        transformer = transformers.only(item.part)
        label = f"losses, {item.part.expert}" if item.part.expert else "losses"
        with progress.bar(total=len(todo), description=label, unit="model") as bar:
            for key, subject in todo.items():
                progress.show_figures(bar, subject.name if subject else "base")
                known[key] = _measure(setup, item, subject, transformer).tolist()
                write_json(path, known)
                bar.update()
    base, *others = (np.array(known[key]) for key in keys)
    return base, others


def _key(setup: Setup, item: Range, subject: Subject | None) -> str:
    """Fingerprint of a table: of the clips, the sigmas, the noise and the weights."""
    adapter = [subject.scaled.sha256, subject.scaled.scale] if subject else None
    facts = {**setup.facts, "weights": setup.weights[item.part.subfolder]}
    return fingerprint([item.panel.key(item.source, facts), adapter])


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
        if not all(re.fullmatch(r"[0-9a-f]{64}", str(key)) for key in known):
            raise ValueError("its keys are not those of an evaluation")
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{path} is damaged or of something else ({error}): choose another --output-dir, or "
            "remove the file, and the losses are measured again"
        ) from None
    return known


def _measure(setup: Setup, item: Range, subject: Subject | None, transformer: Any) -> Table:
    """Measure a panel with a subject's adapter, or without any."""
    if subject:
        attach(transformer, [subject.scaled])
    table = losses(item.panel, transformer, item.source, device=setup.device, dtype=setup.dtype)
    if subject:
        detach(transformer)
    model = str(subject.scaled.adapter.path) if subject else setup.model
    require_finite(item.panel, table, model)
    return table


def compare(panel: Panel, table: Table, other: Table, *, name: str) -> dict[str, Any]:
    """Compare the losses of two models: over all clips, by activity and by sigma.

    Args:
        panel: Clips (rows) and sigmas (columns) of both tables.
        table: Losses of the adapter.
        other: Losses of the model to compare with.
        name: Name of the other model's mean in the result.
    """
    activities = [clip.activity for clip in panel.clips]
    groups = [clip.source_group for clip in panel.clips]
    rows = {
        activity: [i for i, found in enumerate(activities) if found == activity]
        for activity in sorted(set(activities))
    }

    def over(clips: Sequence[int], columns: Sequence[int]) -> dict[str, Any]:
        cells = np.ix_(clips, columns)
        report = summarize(
            table[cells],
            other[cells],
            sigmas=[panel.sigmas[column] for column in columns],
            activities=[activities[clip] for clip in clips],
            groups=[groups[clip] for clip in clips],
        )
        return _figures(report, name)

    all_rows, all_columns = range(len(activities)), range(len(panel.sigmas))
    return {
        **over(all_rows, all_columns),
        "per_activity": {activity: over(clips, all_columns) for activity, clips in rows.items()},
        "per_sigma": [
            {"sigma": sigma, **over(all_rows, [column])}
            for column, sigma in enumerate(panel.sigmas)
        ],
    }


def _figures(report: Report, name: str) -> dict[str, Any]:
    return {
        name: report.base_mean,
        "adapter": report.mean,
        "paired_difference": report.difference,
        "standard_error": report.standard_error,
        "ci95": list(report.ci95) if report.ci95 else None,
        "clips": report.num_clips,
        "source_groups": report.num_groups,
    }
