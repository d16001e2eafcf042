"""Content of evaluation.json, and the lines that the command prints of it.

Owns: its fields. The arithmetic is in `losses`, `joined` and `measures`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from wanlora import __version__
from wanlora.commands.evaluate import joined, losses
from wanlora.commands.evaluate.measures import against_base, measured
from wanlora.commands.evaluate.setup import Range, Setup
from wanlora.commands.evaluate.subjects import BASE, Subject
from wanlora.commands.evaluate.video_plan import Model
from wanlora.core.intervals import conclusion, describe_change, describe_sample
from wanlora.report.evaluation_experts import title
from wanlora.wan.variants import Expert

Tables = tuple[losses.Table, list[losses.Table]]
"""Losses of the base, and of each adapter, on one range."""


def question(setup: Setup) -> dict[str, Any]:
    """Fields of evaluation.json that are known before anything is measured."""
    fields = {
        "wanlora": __version__,
        "model": setup.model,
        "cache": str(setup.cache),
        "view": setup.view.name,
        "seed": setup.source.seed,
        **setup.facts,
        "split": setup.split,
        "clips": [clip.clip_id for clip in setup.clips],
        "sigmas": setup.sigmas,
        "video_settings": {
            "size": list(setup.bucket),
            "steps": setup.steps,
            "guidance_scale": setup.guidance_scales[0],
            "shift": setup.source.shift,
            "fps": setup.fps,
            "videos_per_activity": setup.num_videos,
        },
    }
    if setup.is_pair:
        fields["video_settings"]["guidance_scale_low"] = setup.guidance_scales[1]
        fields["density"] = setup.density
        fields["experts"] = {
            item.part.expert: {
                "sigma_range": list(item.part.sigmas),
                "share": item.share,
                "sigmas": list(item.panel.sigmas),
            }
            for item in setup.ranges
        }
    return fields


def evaluation(
    setup: Setup, compared: Sequence[Subject], tables: Sequence[Tables]
) -> dict[str, Any]:
    """Build the content of evaluation.json without videos.

    Args:
        setup: Values that are the same for all models.
        compared: The adapters.
        tables: Losses of each range of the setup; the adapters in the order of `compared`.
    """
    found: dict[str, dict[str, Any]] = {}
    best = {}
    for item, (base, others) in zip(setup.ranges, tables, strict=True):
        own = [subject for subject in compared if subject.expert == item.part.expert]
        adapters = _adapters(item, own, base, others)
        found |= {adapter["name"]: adapter for adapter in adapters}
        best[item.part.expert] = min(adapters, key=lambda one: one["validation"]["adapter"])["name"]
    adapters = [found[item.name] for item in compared]
    pair = _of_pair(setup, compared, tables, adapters) if setup.is_pair else {}
    return {
        **question(setup),
        "best": None if setup.is_pair else best[None],
        "validation": adapters[0]["validation"],
        "adapters": adapters,
        **({"best_by_expert": best, **pair} if setup.is_pair else {}),
        "videos": None,
    }


def _adapters(
    item: Range, own: Sequence[Subject], base: losses.Table, others: Sequence[losses.Table]
) -> list[dict[str, Any]]:
    """Compare the adapters of a transformer with its base, and with the best of them."""
    found = [losses.compare(item.panel, table, base, name="base") for table in others]
    best = min(range(len(others)), key=lambda index: float(found[index]["adapter"]))
    return [
        {
            "name": subject.name,
            "run": subject.run,
            **subject.scaled.record,
            "step": subject.step,
            **({"expert": subject.expert, "named": subject.named} if subject.expert else {}),
            "validation": validation,
            "against_best": losses.compare(item.panel, table, others[best], name="best"),
        }
        for subject, table, validation in zip(own, others, found, strict=True)
    ]


def _of_pair(
    setup: Setup,
    compared: Sequence[Subject],
    tables: Sequence[Tables],
    adapters: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Figures of both experts together, of the adapters that the command line names."""
    groups = [clip.source_group for clip in setup.clips]
    ranges: dict[Expert, joined.RangeLosses] = {}
    validations: dict[Expert, Mapping[str, Any]] = {}
    for item, (base, others) in zip(setup.ranges, tables, strict=True):
        expert = item.part.expert
        assert expert
        own = [subject for subject in compared if subject.expert == expert]
        number = next(index for index, subject in enumerate(own) if subject.named)
        ranges[expert] = joined.RangeLosses(item.share, base, others[number])
        validations[expert] = next(
            found["validation"] for found in adapters if found["name"] == own[number].name
        )
    both = len(ranges) == 2
    gains = joined.compare_gains(ranges, groups) if both else None
    return {
        "joined": joined.join(ranges, groups) if both else None,
        "gains": gains,
        "answer": joined.answer(validations, gains),
    }


def with_videos(found: dict[str, Any], models: Mapping[str, Model]) -> dict[str, Any]:
    """Add the measures of the videos and the path of each video."""
    base = models[BASE]
    listed = [
        {
            "activity": video.activity,
            "prompt": video.prompt,
            "seed": video.seed,
            **({"first_frame_of": video.start.clip_id} if video.start else {}),
            "files": {name: str(model.videos[number].path) for name, model in models.items()},
        }
        for number, video in enumerate(base.videos)
    ]
    measures = {
        "per_activity": {name: measured(model) for name, model in models.items()},
        "against_base": {
            name: against_base(model, base) for name, model in models.items() if model.subjects
        },
    }
    return found | {"videos": {"measures": measures, "list": listed}}


def lines(found: Mapping[str, Any]) -> list[str]:
    """Format a line for each adapter, and for a model with two transformers both together."""
    text = []
    for item in found["adapters"]:
        about = f" ({title(found, item['expert'])})" if "expert" in item else ""
        text.append(loss_line(f"{item['name']}{about}", item["validation"]))
    if found.get("joined"):
        text.append(loss_line("both experts, all noise levels", found["joined"]))
    return [*text, found["answer"]] if "answer" in found else text


def loss_line(name: str, validation: Mapping[str, Any]) -> str:
    """Format an adapter's loss and its difference from the base's."""
    base, interval = validation["base"], validation["ci95"]
    change = describe_change(validation["paired_difference"], base, interval)
    sample = describe_sample(validation["clips"], validation["source_groups"])
    line = f"{name}: held-out loss {validation['adapter']:.4f}, base {base:.4f} ({change}"
    if interval is None:
        return f"{line}; {sample})"
    return f"{line}: {conclusion(interval, validation['source_groups'])}; {sample})"
