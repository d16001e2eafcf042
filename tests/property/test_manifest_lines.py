"""Lines of a manifest edited at random: each is read or listed, and no error escapes."""

import json
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.clips import clip
from wanlora.core.buckets import MAX_FPS, MAX_FRAMES, MAX_SIDE_PX, MIN_FPS
from wanlora.data.clip import Clip, clip_key, sample_aspect
from wanlora.data.manifest_lines import line_of, parse_line
from wanlora.errors import ManifestError

OWN = json.loads(line_of(clip(source="a.npz", kind="npz")))
PLAIN = {"npz": "a.npz", "prompt": "a person walks", "activity": "walking", "split": "train"}
PATH = Path("/data/train.jsonl")

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates too
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT,
    st.sampled_from([10**4000, 1e300, -1, 0, "", "1/0", "abc", "\0", "a" * 5000, "\ud83d", [], {}]),
    st.recursive(st.none() | ANY_TEXT, lambda inner: st.lists(inner, max_size=3)
                 | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=5),
)  # fmt: skip


@st.composite
def edited_rows(draw):
    """A valid row with one to three fields replaced, removed or added, at the top or one below."""
    row = json.loads(json.dumps(draw(st.sampled_from([OWN, PLAIN]))))
    for _ in range(draw(st.integers(1, 3))):
        nested = [row] + [value for value in row.values() if isinstance(value, dict)]
        place = draw(st.sampled_from(nested))
        name = draw(st.sampled_from(sorted(place)) if place else ANY_TEXT)
        if draw(st.booleans()):
            place[name] = draw(VALUES)
        else:
            place.pop(name, None)
    return row


def read_or_listed(line: bytes) -> Clip | None:
    """Parse a line; an error other than ManifestError escapes and fails the test."""
    try:
        return parse_line(line, PATH, "train.jsonl:1")
    except ManifestError as error:
        reason = str(error)
    assert reason.startswith("train.jsonl:1: ")
    assert len(reason.encode()) < 2000
    return None


@given(edited_rows())
@example(OWN | {"orig": {"codec": "\ud800"}})
@example(OWN | {"transform": {"\udfff": 1}})
@example(OWN | {"source_sha256": "\ud83d"})
@settings(max_examples=200, deadline=None)
def test_an_edited_line_gives_a_clip_within_bounds_or_a_reason(row):
    found = read_or_listed(json.dumps(row).encode())
    if found is None:
        return
    assert MIN_FPS <= found.fps <= MAX_FPS
    assert 0 <= found.num_frames <= MAX_FRAMES
    assert 0 <= found.height <= MAX_SIDE_PX
    assert 0 <= found.width <= MAX_SIDE_PX
    clip_key(found, "ab" * 32)
    sample_aspect(found.transform)
    written = line_of(found).encode(errors="strict")
    assert parse_line(written, PATH, "train.jsonl:1").prompts == found.prompts


@given(st.data())
@example(None)
@settings(max_examples=100, deadline=None)
def test_edited_bytes_give_a_clip_or_a_reason(data):
    line = bytearray(json.dumps(OWN).encode())
    if data is not None:
        for _ in range(data.draw(st.integers(1, 5))):
            at = data.draw(st.integers(0, len(line) - 1))
            line[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    read_or_listed(bytes(line))
