"""The transformer that each adapter is for, in a model that has two.

Owns: the choice by an adapter's header or by its flag, and refusing adapters that do not fit the
experts of the model. Must not import torch: a command checks this before it loads anything.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from wanlora.adapters.header import AdapterHeader, expert_and_place, read_header, split_scale
from wanlora.adapters.trained_on import check_kind, trained_on
from wanlora.core import units
from wanlora.errors import AdapterError
from wanlora.wan.variants import VARIANTS, Expert, Variant

EXPERTS: tuple[Expert, ...] = get_args(Expert)
ANY_EXPERT = "--adapter"


@dataclass(frozen=True, slots=True)
class GivenAdapter:
    """An adapter as the command line names it.

    Attributes:
        header: Its names and metadata.
        scale: Its strength; 1 = as trained.
        expert: Expert that its flag names; None for `--adapter`, which leaves it to the header.
    """

    header: AdapterHeader
    scale: float
    expert: Expert | None = None

    @property
    def text(self) -> str:
        """Its flag and its file, for messages."""
        return f"{flag_of(self.expert)} {self.header.path}"


def flag_of(expert: Expert | None) -> str:
    """Flag that gives an adapter for an expert."""
    return f"{ANY_EXPERT}-{expert}" if expert else ANY_EXPERT


def read_given(
    adapter: Sequence[str], *, high: Sequence[str] = (), low: Sequence[str] = ()
) -> list[GivenAdapter]:
    """Read the headers of the adapters that a command line names, in its order.

    Args:
        adapter: Values of `--adapter`: PATH or PATH=SCALE.
        high: Values of `--adapter-high`.
        low: Values of `--adapter-low`.

    Raises:
        AdapterError: There is no adapter, its keys cannot be used, or a scale is not a number.
    """

    def read() -> Iterator[GivenAdapter]:
        flags: tuple[tuple[Expert | None, Sequence[str]], ...]
        flags = ((None, adapter), ("high", high), ("low", low))
        for expert, texts in flags:
            for text in texts:
                path, scale = split_scale(text, flag=flag_of(expert))
                yield GivenAdapter(read_header(path), scale, expert)

    return list(read())


def route(given: Sequence[GivenAdapter], variant: Variant, *, model: str) -> list[Expert | None]:
    """Select the expert of each adapter; None for each in a model with one transformer.

    An adapter's header decides, or the flag of an adapter without such a header. An expert has at
    most one adapter of `--adapter`: two of them are nearly always a mistake. Several adapters are
    added up if the flag of the expert is repeated.

    Args:
        given: Adapters of the command line.
        variant: Variant of the model.
        model: The `--model` value, for messages.

    Raises:
        AdapterError: An adapter is for another model, such as one of the other kind (text or image
            to video), or for the other expert than its flag names
            (by its header, its keys, or another tool's header field or file name); its expert has
            an adapter already; or neither its header nor its flag names an expert.
    """
    for item in given:
        check_kind(item.header, variant, text=item.text, model=model)
    if variant.boundary is None:
        for item in given:
            _require_one_transformer(item, variant, model)
        return [None for _ in given]
    found = [_expert_of(item, variant, model) for item in given]
    for expert in EXPERTS:
        same = [item for item, its in zip(given, found, strict=True) if its == expert]
        if len(same) > 1 and any(item.expert is None for item in same):
            flag = flag_of(expert)
            raise AdapterError(
                f"{len(same)} adapters are for the {expert}-noise expert of {model}: "
                f"{units.names([item.text for item in same])}; expected one for each expert. To "
                f"add them up, pass each with {flag}"
            )
    return list(found)


def _require_one_transformer(item: GivenAdapter, variant: Variant, model: str) -> None:
    """Refuse an adapter of an expert, or of a transformer of another shape."""
    here = f"{model} ({variant.name}) has one transformer"
    if item.header.expert:
        raise AdapterError(
            f"{item.text} was trained for the {item.header.expert}-noise expert of "
            f"{trained_on(item.header)}, and {here}: pass the --model that it was trained on"
        )
    if item.expert:
        raise AdapterError(
            f"{item.text}: {here}, and {flag_of(item.expert)} is for models with two. Pass the "
            f"adapter with {ANY_EXPERT}, or the --model with two transformers that it is for"
        )
    trained = VARIANTS.get(item.header.provenance.get("variant", ""))
    if trained and trained.shape != variant.shape:
        raise AdapterError(
            f"{item.text} was trained on {trained_on(item.header)}, and {model} is {variant.name}, "
            "whose transformer has another shape: pass the --model that it was trained on"
        )


def _expert_of(item: GivenAdapter, variant: Variant, model: str) -> Expert:
    """Select the expert of an adapter in a model with two transformers. Raises as `route`."""
    trained_variant = item.header.provenance.get("variant")
    if trained_variant is not None and trained_variant != variant.name:
        raise AdapterError(
            f"{item.text} was trained on {trained_on(item.header)}, and {model} is {variant.name}: "
            "pass the --model that it was trained on"
        )
    trained = item.header.expert
    if trained is None:
        _check_flag(item, model)
    if trained and item.expert and trained != item.expert:
        raise AdapterError(
            f"{item.text} was trained for the {trained}-noise expert: pass it with "
            f"{flag_of(trained)} or {ANY_EXPERT}. Are the two files swapped?"
        )
    expert = trained or item.expert
    assert expert
    return expert


def _check_flag(item: GivenAdapter, model: str) -> None:
    """Check the flag of a file of another tool: it is needed, and must not contradict the file."""
    path = item.header.path
    shown, place = expert_and_place(item.header)
    if item.expert is None:
        experts = (shown,) if shown else EXPERTS
        flags = " or ".join(f"{flag_of(expert)} {path}" for expert in experts)
        raise AdapterError(
            f"{item.text}: {model} has two transformers, and the file does not record the one it "
            f"is for: pass {flags}"
        )
    if shown and shown != item.expert:
        command = f"wanlora export --adapter {shlex.quote(str(path))} --expert {item.expert}"
        raise AdapterError(
            f"{item.text} is for the {shown}-noise expert, by its {place}: pass it with "
            f"{flag_of(shown)}. Are the two files swapped? If its {place} is wrong, record the "
            f"expert with\n  {command} --output NAME.safetensors"
        )


def describe(given: Sequence[GivenAdapter], experts: Sequence[Expert | None]) -> str:
    """Format which adapters each expert runs with: `high-noise expert: a; low-noise expert: ...`.

    Args:
        given: Adapters of the command line.
        experts: From `route`, of a model with two transformers.
    """
    parts = []
    for expert in EXPERTS:
        files = [
            f"{item.header.path} at {item.scale:g}"
            for item, its in zip(given, experts, strict=True)
            if its == expert
        ]
        parts.append(f"{expert}-noise expert: {units.names(files) or 'runs without an adapter'}")
    return "; ".join(parts)
