"""`wanlora inspect`: what is in a cache, and whether it is whole.

Owns: the summary of a store and its views, and the check of every row. Writes nothing.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wanlora.config import InspectConfig
from wanlora.core.buckets import SPATIAL_FACTOR, TEMPORAL_FACTOR, Bucket
from wanlora.errors import StoreError, StoreVersionError
from wanlora.progress import bar
from wanlora.store import index, objects, schema
from wanlora.store.reader import RowReader
from wanlora.store.schema import Kind
from wanlora.store.views import View, read_view, view_names

Readers = dict[tuple[Kind, str], RowReader]

SHOWN = 10
"""How many invalid rows are printed; all of them stand in the JSON."""


@dataclass(frozen=True, slots=True)
class InspectResult:
    """What a cache holds.

    Attributes:
        cache: The folder.
        clips: Different clips with latents, over all fingerprints.
        prompts: Different prompts with an embedding.
        buckets: A dict a size: bucket, latent_shape, clips, bytes, bytes_per_clip.
        bytes: Of the whole store on disk.
        bytes_per_clip: Of the whole store; 0 without clips.
        fingerprints: A dict an encoder: kind, fingerprint, rows, segments, bytes, provenance.
        views: A dict a view: name, clips, splits, prompts, missing_clips, missing_prompts.
        invalid: A line for each row, record or view that cannot be used.
        verified: Rows that were read and checked.
    """

    cache: str
    clips: int
    prompts: int
    buckets: list[dict[str, Any]]
    bytes: int
    bytes_per_clip: float
    fingerprints: list[dict[str, Any]]
    views: list[dict[str, Any]]
    invalid: list[str] = field(default_factory=list)
    verified: int = 0

    @property
    def exit_code(self) -> int:
        """3 when something is invalid, or a view lacks rows."""
        lacking = any(view["missing_clips"] or view["missing_prompts"] for view in self.views)
        return 3 if self.invalid or lacking else 0

    def lines(self) -> list[str]:
        """Tables for people."""
        return [
            f"{self.cache}: {self.clips} clips, {self.prompts} prompts, {_size(self.bytes)} "
            f"({_size(self.bytes_per_clip)} a clip)",
            *_table(
                ["bucket", "latents", "clips", "size", "a clip"],
                [
                    [
                        row["bucket"], "x".join(map(str, row["latent_shape"])), row["clips"],
                        _size(row["bytes"]), _size(row["bytes_per_clip"]),
                    ]
                    for row in self.buckets
                ],
            ),
            *_table(
                ["kind", "fingerprint", "rows", "segments", "size", "made with"],
                [
                    [
                        row["kind"], schema.short(row["fingerprint"]), row["rows"], row["segments"],
                        _size(row["bytes"]), _made_with(row["provenance"]),
                    ]
                    for row in self.fingerprints
                ],
            ),
            *_table(
                ["view", "clips", "splits", "prompts", "rows"],
                [
                    [
                        row["name"], row["clips"],
                        ", ".join(f"{n} {split}" for split, n in row["splits"].items()),
                        row["prompts"], _completeness(row),
                    ]
                    for row in self.views
                ],
            ),
            *self._verdict(),
        ]  # fmt: skip

    def _verdict(self) -> list[str]:
        lines = [f"{self.verified} rows read and checked"] if self.verified else []
        if self.invalid:
            lines.append(f"{len(self.invalid)} invalid:")
            lines += [f"  {line}" for line in self.invalid[:SHOWN]]
            lines += ["  ... (all of them: --json)"] if len(self.invalid) > SHOWN else []
        if self.exit_code:
            lines.append(f"to encode what is missing: wanlora cache-latents --cache {self.cache}")
        return lines


def run(config: InspectConfig) -> InspectResult:
    """Summarize a cache; with `verify`, read every row.

    Raises:
        StoreError: There is no cache, or the disk refuses.
        StoreVersionError: It belongs to another release.
    """
    cache = config.cache
    index.open_store(cache)
    invalid: list[str] = []
    readers: Readers = {}
    fingerprints = []
    for kind in schema.KINDS:
        for fingerprint, provenance in index.provenances(cache, kind).items():
            segments, damaged = index.scan(cache, kind, fingerprint)
            invalid += damaged
            reader = readers[kind, fingerprint] = RowReader(cache, kind, segments)
            fingerprints.append(
                {
                    "kind": kind,
                    "fingerprint": fingerprint,
                    "rows": len(reader.rows),
                    "segments": len(segments),
                    "bytes": objects.num_bytes(cache, schema.fingerprint_key(kind, fingerprint)),
                    "provenance": provenance,
                }
            )
    views = [view for name in view_names(cache) for view in _view(cache, name, readers, invalid)]
    if config.verify:
        invalid += _invalid_rows(readers)
    clips = _num_different(readers, "latents")
    num_bytes = objects.num_bytes(cache, schema.STORE)
    return InspectResult(
        cache=str(cache),
        clips=clips,
        prompts=_num_different(readers, "text"),
        buckets=_buckets(cache, readers),
        bytes=num_bytes,
        bytes_per_clip=num_bytes / clips if clips else 0.0,
        fingerprints=fingerprints,
        views=views,
        invalid=invalid,
        verified=sum(len(reader.rows) for reader in readers.values()) if config.verify else 0,
    )


def _num_different(readers: Readers, kind: Kind) -> int:
    tables = (reader.rows for (found, _), reader in readers.items() if found == kind)
    return len({key for rows in tables for key in rows})


def _buckets(cache: Path, readers: Readers) -> list[dict[str, Any]]:
    """Clips and bytes of each size, over all fingerprints."""
    clips: Counter[tuple[int, ...]] = Counter()
    num_bytes: Counter[tuple[int, ...]] = Counter()
    for (kind, _), reader in readers.items():
        if kind != "latents":
            continue
        for segment in reader.segments:
            shape = schema.shape_of(segment.key.rsplit("/", 1)[0])
            num_bytes[shape] += objects.num_bytes(cache, segment.key)
        clips.update(schema.shape_of(row.segment.rsplit("/", 1)[0]) for row in reader.rows.values())
    return [
        {
            "bucket": str(_bucket_of(shape)),
            "latent_shape": list(shape),
            "clips": clips[shape],
            "bytes": num_bytes[shape],
            "bytes_per_clip": num_bytes[shape] / clips[shape],
        }
        for shape in sorted(clips)
    ]


def _bucket_of(shape: Sequence[int]) -> Bucket:
    """Size of a clip in pixels from that of its latents C F H W; inverse of `latent_shape`."""
    _, frames, height, width = shape
    return Bucket(
        1 + TEMPORAL_FACTOR * (frames - 1), SPATIAL_FACTOR * height, SPATIAL_FACTOR * width
    )


def _view(cache: Path, name: str, readers: Readers, invalid: list[str]) -> Iterator[dict[str, Any]]:
    try:
        view = read_view(cache, name)
    except StoreVersionError:
        raise
    except StoreError as error:
        invalid.append(str(error))
        return
    lost_clips, lost_prompts = _missing(view, readers)
    yield {
        "name": name,
        "clips": len(view.clips),
        "splits": dict(sorted(Counter(clip.split for clip in view.clips).items())),
        "prompts": len(view.prompt_keys()),
        "model": view.model,
        "missing_clips": lost_clips,
        "missing_prompts": lost_prompts,
    }


def _missing(view: View, readers: Readers) -> tuple[list[str], list[str]]:
    """Clip ids and prompt keys of which the store has no row."""
    latents, text = readers.get(("latents", view.latents)), readers.get(("text", view.text))
    clips = {} if latents is None else latents.rows
    prompts = {} if text is None else text.rows
    return (
        [clip.clip_id for clip in view.clips if clip.key not in clips],
        [key for key in view.prompt_keys() if key not in prompts],
    )


def _invalid_rows(readers: Readers) -> list[str]:
    """Read every row: checksum, finite, not constant."""
    invalid = []
    total = sum(len(reader.rows) for reader in readers.values())
    with bar(total=total, description="verify", unit="row") as progress:
        for (kind, _), reader in readers.items():
            for key in reader.rows:
                if problem := _problem_with(kind, reader, key):
                    invalid.append(problem)
                progress.update(1)
    return invalid


def _problem_with(kind: Kind, reader: RowReader, key: str) -> str | None:
    try:
        row = reader.read(key)
    except StoreError as error:
        return str(error)
    if not np.isfinite(row).all():
        return f"{kind} row {key} has values that are not finite"
    if row.size > 1 and row.min() == row.max():
        return f"{kind} row {key} is constant ({row.flat[0]}): the encoder's weights are wrong"
    return None


def _made_with(provenance: dict[str, Any]) -> str:
    """Main fields of a provenance on one line: hashes shortened, lists left out."""
    parts = []
    for name, value in provenance.items():
        if name == "kind" or isinstance(value, list | dict):
            continue
        parts.append(f"{name}={schema.short(value) if len(str(value)) == 64 else value}")
    return " ".join(parts)


def _completeness(view: dict[str, Any]) -> str:
    clips, prompts = len(view["missing_clips"]), len(view["missing_prompts"])
    return f"MISSING {clips} clips, {prompts} prompts" if clips or prompts else "all there"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Columns as wide as their widest cell; nothing when there are no rows."""
    if not rows:
        return []
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return [
        "",
        *(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ),
    ]
