"""Verification of rows. Fast: records and sizes. Full: every byte of every row.

Owns: the difference between a bad row and one that a disk or a network did not return. Reads
segment by segment, repeated rows too: a copy that is not used today is read when the first one is
removed. Reads the commit records, never the snapshot. Changes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import CorruptRowError, StoreError
from wanlora.progress import bar
from wanlora.store import commit_records, index, schema, storage
from wanlora.store.commit_records import Damaged, Segment
from wanlora.store.row_reader import RowReader


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be used, or without a key a whole segment that cannot be used."""

    segment: str
    key: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a full verification.

    Attributes:
        bad: Rows that differ from those that were written.
        unread: A line for each row that could not be read; it may be whole.
    """

    bad: list[Bad] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


Generations = Sequence[tuple[Kind, str]]
"""Kinds and whole fingerprints."""


def fast(cache: Location, generations: Generations) -> list[Bad]:
    """Compare the objects of each segment with the sizes in its commit record."""
    found = storage.at(cache).listing(schema.STORE)
    bad: list[Bad] = []
    for kind, fingerprint in generations:
        for record in commit_records.read_records(cache, kind, fingerprint):
            if isinstance(record, Segment):
                wrong = _wrong_sizes(cache, record, found)
                bad += [Bad(record.key, None, message) for message in wrong]
            else:
                bad.append(Bad(record.key, None, record.message))
    return bad


def full(cache: Location, generations: Generations) -> Verdict:
    """Read every row: checksum, finite, not constant. Damaged records are listed without a key."""
    total = sum(len(index.look(cache, *one)[0].row_keys) for one in generations)
    verdict = Verdict()
    with bar(total=total, description="verify", unit="row") as progress:
        for kind, fingerprint in generations:
            for record in commit_records.read_records(cache, kind, fingerprint):
                if isinstance(record, Damaged):
                    verdict.bad.append(Bad(record.key, None, record.message))
                    continue
                _read_all(cache, record, verdict)
                progress.update(len(record.row_keys))
    return verdict


def _read_all(cache: Location, segment: Segment, verdict: Verdict) -> None:
    reader = RowReader.of_segments(cache, segment.kind, [segment])
    for key in segment.row_keys:
        try:
            if message := problem_with(segment.kind, reader, key):
                verdict.bad.append(Bad(segment.key, key, message))
        except StoreError as error:
            verdict.unread.append(str(error))


def problem_with(kind: Kind, reader: RowReader, key: str) -> str | None:
    """Reason why a row cannot be used, or None.

    Raises:
        StoreError: The disk or the network does not return it; it may be whole.
    """
    try:
        row = reader.read(key)
    except CorruptRowError as error:
        return str(error)
    if not np.isfinite(row).all():
        return f"{kind} row {key} has values that are not finite"
    if row.size > 1 and row.min() == row.max():
        return f"{kind} row {key} is constant ({row.flat[0]}): the encoder's weights are wrong"
    return None


def _wrong_sizes(
    cache: Location, segment: Segment, found: Mapping[str, storage.Entry]
) -> Iterator[str]:
    for name, num_bytes in segment.record.get("sizes", {}).items():
        entry = found.get(f"{segment.key}/{name}")
        if entry is None:
            yield f"{cache / segment.key}/{name} is missing"
        elif entry.num_bytes != num_bytes:
            yield (
                f"{cache / segment.key}/{name} has {entry.num_bytes} bytes, expected {num_bytes}"
            )
