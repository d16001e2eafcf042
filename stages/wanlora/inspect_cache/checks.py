"""Is every row what was written? Fast: records and sizes. Full: every byte of every row.

Owns: what counts as a bad row, as against one that a disk or a network did not give. Reads segment
by segment, repeated rows too: one that does not count today is read as soon as the one before it is
gone. Changes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from wanlora.core.location import Location
from wanlora.errors import CorruptRowError, StoreError
from wanlora.progress import bar
from wanlora.store import objects, schema
from wanlora.store.index import Segment
from wanlora.store.reader import RowReader
from wanlora.store.schema import Kind


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be used, or with no key a whole segment that cannot."""

    segment: str
    key: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a full verification found.

    Attributes:
        bad: Rows that are not what was written.
        unread: A line for each row that could not be read: nobody knows whether it is whole.
    """

    bad: list[Bad] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def fast(cache: Location, segments: Sequence[Segment]) -> list[Bad]:
    """Compare the objects of each segment with the sizes in its commit record."""
    found = objects.listing(cache, schema.STORE)
    return [
        Bad(segment.key, None, message)
        for segment in segments
        for message in _wrong_sizes(cache, segment, found)
    ]


def full(cache: Location, segments: Mapping[Kind, Sequence[Segment]]) -> Verdict:
    """Read every row: checksum, finite, not constant."""
    total = sum(len(s.row_keys) for group in segments.values() for s in group)
    verdict = Verdict()
    with bar(total=total, description="verify", unit="row") as progress:
        for kind, group in segments.items():
            for segment in group:
                reader = RowReader.of_segments(cache, kind, [segment])
                for key in segment.row_keys:
                    try:
                        if message := problem_with(kind, reader, key):
                            verdict.bad.append(Bad(segment.key, key, message))
                    except StoreError as error:
                        verdict.unread.append(str(error))
                    progress.update(1)
    return verdict


def problem_with(kind: Kind, reader: RowReader, key: str) -> str | None:
    """Say why a row cannot be used, or None.

    Raises:
        StoreError: The disk or the network does not give it, so it may well be whole.
    """
    try:
        row = reader.read(key)
        if kind == "latents":
            reader.read_logvar(key)
    except CorruptRowError as error:
        return str(error)
    if not np.isfinite(row).all():
        return f"{kind} row {key} has values that are not finite"
    if row.size > 1 and row.min() == row.max():
        return f"{kind} row {key} is constant ({row.flat[0]}): the encoder's weights are wrong"
    return None


def _wrong_sizes(
    cache: Location, segment: Segment, found: Mapping[str, objects.Entry]
) -> Iterator[str]:
    for name, num_bytes in segment.record.get("sizes", {}).items():
        entry = found.get(f"{segment.key}/{name}")
        if entry is None:
            yield f"{cache / segment.key}/{name} is missing"
        elif entry.num_bytes != num_bytes:
            yield (
                f"{cache / segment.key}/{name} has {entry.num_bytes} bytes, expected {num_bytes}"
            )
