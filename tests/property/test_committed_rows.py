"""Whatever is remembered of a store, what counts as committed is what a plain scan finds."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.stores import BUCKET, FINGERPRINT
from wanlora.core.buckets import latent_shape
from wanlora.store import index, schema, storage
from wanlora.store.rows import Row, Rows, from_bytes, join, of_segment, to_bytes

PARENT = schema.segments_key("latents", FINGERPRINT["latents"], latent_shape(BUCKET))
SNAPSHOT = schema.snapshot_key("latents", FINGERPRINT["latents"])
names = st.integers(0, 6).map(lambda number: f"{number:016x}")
keys = st.integers(0, 12).map(lambda number: f"{number:064x}")
changes = st.one_of(
    st.tuples(st.just("write"), names, st.lists(keys, min_size=1, max_size=4, unique=True)),
    st.tuples(st.just("remove"), names),
    st.tuples(st.just("keep")),
    st.tuples(st.just("look")),
    st.tuples(st.just("spoil"), st.integers(0, 3000), st.integers(1, 255)),
)


def crc_of(segment: str, key: str) -> int:
    return int(segment, 16) * 1000 + int(key, 16)


def write_record(cache: Path, name: str, row_keys: list[str]) -> None:
    """A commit record without its arrays: all that an index reads. A segment never changes."""
    record = {
        "kind": "segment", "version": schema.VERSION, "fingerprint": FINGERPRINT["latents"],
        "count": len(row_keys), "keys": row_keys,
        "crc32c": {"latent": [crc_of(name, key) for key in row_keys]},
    }  # fmt: skip
    storage.at(cache).put(f"{PARENT}/{name}/{schema.GROUP}", schema.group_document(record))


def expected(segments: dict[str, list[str]]) -> dict[str, Row]:
    """The plain way: a dict, the lowest segment id first."""
    found: dict[str, Row] = {}
    for name in sorted(segments):
        for row, key in enumerate(segments[name]):
            found.setdefault(key, Row(f"{PARENT}/{name}", row, crc_of(name, key)))
    return found


def committed(cache: Path, known: Rows | None = None) -> Rows:
    return index.committed(cache, "latents", FINGERPRINT["latents"], known=known)


@given(st.lists(changes, max_size=12))
@settings(max_examples=40, deadline=None)
def test_a_snapshot_old_damaged_or_gone_changes_nothing(steps: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache, there, ever, known = Path(folder), {}, {}, None
        for what, *arguments in steps:
            if what == "write":
                name, row_keys = arguments
                there[name] = ever.setdefault(name, row_keys)
                write_record(cache, name, there[name])
            elif what == "remove" and there.pop(arguments[0], None):
                storage.at(cache).remove(f"{PARENT}/{arguments[0]}/{schema.GROUP}")  # as gc begins
            elif what == "keep":
                index.keep(cache, "latents", FINGERPRINT["latents"], committed(cache))
            elif what == "look":
                known = committed(cache, known)
            elif what == "spoil" and (data := storage.at(cache).get(SNAPSHOT)):
                place, bits = arguments
                spoilt = bytearray(data)
                spoilt[place % len(data)] ^= bits
                storage.at(cache).put(SNAPSHOT, bytes(spoilt))
        assert dict(committed(cache)) == dict(committed(cache, known)) == expected(there)


def test_every_flipped_or_missing_byte_of_a_snapshot_is_noticed_or_harmless() -> None:
    rows = join([of_segment(f"{PARENT}/{i:016x}", [f"{i:064x}"], [i], 9) for i in range(2)])
    data = to_bytes(rows, "latents")
    assert dict(from_bytes(data, "latents") or {}) == dict(rows)
    assert from_bytes(data, "text") is None
    for place in range(len(data)):
        flipped = [
            data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :] for bits in (0x41, 0x01)
        ]
        for damaged in (*flipped, data[:place]):
            found = from_bytes(damaged, "latents")
            assert found is None or dict(found) == dict(rows), place
