"""Adapters that are compared: those of `--adapter`, and the checkpoints of their runs.

Owns: their names in the report.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wanlora.adapters.attach import ScaledAdapter, scaled
from wanlora.adapters.header import split_scale
from wanlora.runs import run_folder
from wanlora.wan.variants import Expert

BASE = "base"
REAL = "real clip"
"""Names of the base model and of the clips themselves in the report."""


@dataclass(frozen=True, slots=True)
class Subject:
    """An adapter under comparison.

    Attributes:
        name: Name in the report.
        run: Name that all checkpoints of its run share.
        scaled: Its file and scale.
        expert: Transformer that it is for; None in a model with one.
        named: True if the command line names this file or its folder; False for another checkpoint
            of the same run.
    """

    name: str
    run: str
    scaled: ScaledAdapter
    expert: Expert | None = None
    named: bool = True

    @property
    def step(self) -> int | None:
        """Training steps, from the header; None if it has none."""
        text = self.scaled.adapter.provenance.get("step", "")
        return int(text) if text.isdecimal() else None


def subjects(
    words: Sequence[str], experts: Sequence[Expert | None], *, checkpoints: bool
) -> list[Subject]:
    """Read every adapter, in the order given; checkpoints by step.

    A run's newest checkpoint is the adapter at its root, and its best is often one of the others:
    equal files are compared once. An adapter named twice stays twice.

    Args:
        words: Values of the flags: PATH or PATH=SCALE.
        experts: Transformer that each is for, from `routing.route`.
        checkpoints: Also read the other checkpoints of each run.

    Raises:
        AdapterError: One cannot be read.
    """
    found: list[Subject] = []
    for word, expert in zip(words, experts, strict=True):
        path, scale = split_scale(word)
        items = {
            place: scaled(place, scale) for place in (_places(path) if checkpoints else [path])
        }
        seen = set()
        for place, item in items.items():
            if item.sha256 not in seen:
                named = item.sha256 == items[path].sha256
                found.append(Subject(_name(place, scale), _name(path, scale), item, expert, named))
                seen.add(item.sha256)
    return _distinct(found)


def _places(path: Path) -> Iterator[Path]:
    """Paths of a run's checkpoints, its root and its best adapter; or the path itself."""
    if path.is_dir():
        yield from run_folder.checkpoints(path)
    yield path
    if (path / run_folder.BEST_NAME / run_folder.ADAPTER_NAME).exists():
        yield path / run_folder.BEST_NAME


def _name(path: Path, scale: float) -> str:
    place = path.absolute()
    if place.name == run_folder.ADAPTER_NAME:
        place = place.parent
    name = place.name.removesuffix(".safetensors")
    if place.parent.name == run_folder.CHECKPOINTS_NAME:
        name = f"{place.parent.parent.name} {name}"
    elif place.name == run_folder.BEST_NAME:
        name = f"{place.parent.name} {name}"
    return name if scale == 1 else f"{name} at {scale:g}"


def _distinct(found: Sequence[Subject]) -> list[Subject]:
    """Add a number to every name that an earlier subject has."""
    times = {BASE: 1, REAL: 1}
    named = []
    for item in found:
        times[item.name] = times.get(item.name, 0) + 1
        number = times[item.name]
        named.append(replace(item, name=f"{item.name} ({number})") if number > 1 else item)
    return named
