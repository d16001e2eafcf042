"""Content of an adapter of any tool: layout, rank, scale, targets, norms, provenance.

Owns: the summary and its tables. `adapters` reads the files.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora.adapters.file import AdapterFile, load_adapter
from wanlora.adapters.header import expert_and_place, read_header, sigmas_of
from wanlora.adapters.names import preset_of, template
from wanlora.adapters.trained_on import kind_of
from wanlora.adapters.updates import PREFIX, norm
from wanlora.core import units
from wanlora.report.text_table import text_table
from wanlora.wan.variants import Expert, describe_range
from wanlora.wan.weights import file_sha256

_KINDS = {"T2V": "text to video (T2V)", "I2V": "image to video (I2V)"}
_BARS = 20
"""Width of the longest bar in a table of norms."""


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """Content of an adapter.

    Attributes:
        adapter: Path of the file.
        format: Layout, or the closest one: diffusers, peft, comfyui or kohya.
        prefix: Start of its keys, before the names of modules.
        variant: Model that it was trained on; None if the file does not record it.
        kind: Kind of that model: T2V or I2V; None if the file does not show it.
        expert: Transformer that it is for, in a model with two; None for a model with one, or if
            the file neither records nor shows it.
        expert_from: Source of the expert: header, keys, name, or a field of another tool's header;
            empty without an expert.
        sigmas: Range of sigma of its training; None without an expert, or if the file does not
            record the variant.
        sha256: Hash of the file.
        bytes: Size of the file.
        ranks: Number of modules by rank.
        scales: Number of modules by factor of B A.
        alpha: Alpha that the file has or implies; with several ranks, that of the most common one.
        rslora: True if the scale is alpha / sqrt(rank).
        dora: True if it has magnitudes.
        targets: Name of a preset, or a line that lists the modules and the blocks.
        modules: Names of the adapted modules.
        parameters: Number of parameters.
        dtypes: Number of tensors by type.
        norm: Frobenius norm of the whole update; None if it is not finite, here and below.
        blocks: One dict per block: block, modules, norm. Modules outside the blocks are block "".
        kinds: One dict per kind of module: kind, modules, norm.
        non_finite: Tensors with NaN or infinity.
        zero: Modules whose update is zero because their B still has its initial value.
        provenance: Record of its training or export by wanlora.
        header: The rest of the file's header, as other tools wrote it.
    """

    adapter: str
    format: str
    prefix: str
    variant: str | None
    kind: str | None
    expert: Expert | None
    expert_from: str
    sigmas: tuple[float, float] | None
    sha256: str
    bytes: int
    ranks: dict[int, int]
    scales: dict[float, int]
    alpha: float
    rslora: bool
    dora: bool
    targets: str
    modules: list[str]
    parameters: int
    dtypes: dict[str, int]
    norm: float | None
    blocks: list[dict[str, Any]]
    kinds: list[dict[str, Any]]
    non_finite: list[str]
    zero: list[str]
    provenance: dict[str, str]
    header: dict[str, str]

    @property
    def exit_code(self) -> int:
        """3 if a value is not finite."""
        return 3 if self.non_finite else 0

    def lines(self) -> list[str]:
        """Tables for people."""
        kind = "DoRA" if self.dora else "rsLoRA" if self.rslora else "LoRA"
        return [
            f"{self.adapter}: {kind} in the layout of {self.format} (keys start with "
            f"{self.prefix or 'the names of modules'}), "
            f"{units.number(self.parameters)} parameters, {units.size(self.bytes)}",
            *([f"  variant  {self.variant}"] if self.variant else []),
            *([f"  kind     {_KINDS[self.kind]}"] if self.kind else []),
            *([f"  expert   {self._expert_line()}"] if self.expert else []),
            f"  sha256   {self.sha256}",
            f"  rank     {_counts(self.ranks)}",
            f"  alpha    {self.alpha:g}",
            f"  scale    {_counts({f'{scale:.6g}': n for scale, n in self.scales.items()})}",
            f"  targets  {self.targets} ({len(self.modules)} modules)",
            f"  dtype    {_counts(self.dtypes)}",
            f"  update   {_shown(self.norm)} (Frobenius norm of scale B A over all modules)",
            *_norms("kind", self.kinds),
            *_norms("block", self.blocks),
            *self._recorded(),
            *self._verdict(),
        ]

    def _expert_line(self) -> str:
        found = f"{self.expert}-noise"
        if self.sigmas:
            found += f", {describe_range(self.sigmas)}"
        return found if self.expert_from == "header" else f"{found} (from its {self.expert_from})"

    def _recorded(self) -> list[str]:
        rows = [[name, value] for name, value in sorted((self.provenance | self.header).items())]
        return text_table(["recorded", ""], rows)

    def _verdict(self) -> list[str]:
        lines = []
        if self.non_finite:
            lines.append(
                f"NOT FINITE: {units.names(self.non_finite)} hold NaN or infinity; every video "
                "made with it will be noise"
            )
        if len(self.zero) == len(self.modules):
            lines.append("it changes nothing: every B is zero, as before the first training step")
        elif self.zero:
            lines.append(f"{len(self.zero)} modules have no update, as {self.zero[0]}: B is zero")
        return ["", *lines] if lines else []


def run(path: Path) -> AdapterReport:
    """Summarize an adapter.

    Raises:
        AdapterError: There is no adapter, or its layout is unknown.
    """
    known = read_header(path)
    adapter = load_adapter(known)
    expert, expert_from = expert_and_place(known)
    variant = adapter.provenance.get("variant")
    updates = adapter.updates()
    norms = {module: norm(update) for module, update in updates.items()}
    own = {f"wanlora.{name}" for name in adapter.provenance} | {"format", "lora_adapter_metadata"}
    return AdapterReport(
        adapter=str(adapter.path),
        format=adapter.format,
        prefix=adapter.prefix,
        variant=variant,
        kind=kind_of(known),
        expert=expert,
        expert_from=expert_from,
        sigmas=sigmas_of(expert, variant),
        sha256=file_sha256(adapter.path),
        bytes=adapter.path.stat().st_size,
        ranks=dict(Counter(update.rank for update in updates.values())),
        scales=dict(Counter(update.scale for update in updates.values())),
        alpha=float(adapter.metadata[f"{PREFIX}lora_alpha"]),
        rslora=bool(adapter.metadata.get(f"{PREFIX}use_rslora")),
        dora=any(update.magnitude is not None for update in updates.values()),
        targets=preset_of(updates) or _in_words(updates),
        modules=list(updates),
        parameters=sum(update.num_parameters for update in updates.values()),
        dtypes=adapter.dtypes,
        norm=_total(norms.values()),
        blocks=_grouped("block", norms, 1),
        kinds=_grouped("kind", norms, 0),
        non_finite=_non_finite(adapter),
        zero=[module for module, update in updates.items() if not update.b.any()],
        provenance=adapter.provenance,
        header={key: value for key, value in adapter.header.items() if key not in own},
    )


def _grouped(column: str, norms: Mapping[str, float], part: int) -> list[dict[str, Any]]:
    """Add up norms over modules that share a part of their template: 0 = the kind, 1 = the block.

    Updates of different modules touch different weights, so their squares add up.
    """
    groups: dict[str, list[float]] = {}
    for module, value in norms.items():
        groups.setdefault(template(module)[part], []).append(value)
    names = sorted(groups, key=lambda name: (not name, int(name or 0))) if part else sorted(groups)
    return [
        {column: name, "modules": len(groups[name]), "norm": _total(groups[name])} for name in names
    ]


def _norms(column: str, rows: list[dict[str, Any]]) -> list[str]:
    largest = max((row["norm"] or 0.0 for row in rows), default=0.0)
    return text_table(
        [column, "modules", "update", ""],
        [
            [
                str(row[column]).removeprefix("blocks.N.") or "(no block)",
                row["modules"],
                _shown(row["norm"]),
                "█" * round(_BARS * (row["norm"] or 0.0) / largest) if largest else "",
            ]
            for row in rows
        ],
    )


def _total(norms: Iterable[float]) -> float | None:
    total = math.sqrt(sum(value * value for value in norms))
    return total if math.isfinite(total) else None


def _shown(norm: float | None) -> str:
    return "not finite" if norm is None else f"{norm:.4g}"


def _counts(found: Mapping[Any, int]) -> str:
    """Format one value alone; several with their numbers, the most common first."""
    if len(found) == 1:
        return str(next(iter(found)))
    common = sorted(found.items(), key=lambda item: -item[1])
    return ", ".join(f"{value} ({number})" for value, number in common)


def _in_words(modules: Iterable[str]) -> str:
    """List the modules and the blocks in a line."""
    parts = [template(module) for module in modules]
    kinds = sorted({name.removeprefix("blocks.N.") for name, _ in parts})
    blocks = sorted({int(number) for _, number in parts if number})
    where = f" of {len(blocks)} blocks ({blocks[0]} to {blocks[-1]})" if blocks else ""
    return ", ".join(kinds) + where


def _non_finite(adapter: AdapterFile) -> list[str]:
    return [name for name, tensor in adapter.tensors.items() if not tensor.isfinite().all()]
