"""Whatever is put in comes out, bit for bit, in any order, split into segments anywhere."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.support.stores import FINGERPRINT, PROVENANCE, segments_of
from wanlora.store.row_reader import RowReader
from wanlora.store.schema import KINDS
from wanlora.store.writer import SegmentWriter

SHAPES = {
    "latents": (2, 3, 2, 2), "text": (512, 4), "cond_latents": (2, 3, 2, 2), "clip_vision": (5, 3),
}  # fmt: skip
"""Shape of a row by kind; prompts have 1 to 512 tokens."""


def finite(dtype: str) -> st.SearchStrategy:
    width = np.dtype(dtype).itemsize * 8
    return st.floats(allow_nan=False, allow_infinity=False, width=width)


@st.composite
def stores(draw: st.DrawFn) -> tuple:
    kind = draw(st.sampled_from(sorted(KINDS)))
    dtype = draw(st.sampled_from(["float16", "float32"]))
    rows = {}
    for key in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 512) | st.sampled_from([1, 63, 64, 65, 512]))
        shape = (length, *SHAPES[kind][1:]) if kind == "text" else SHAPES[kind]
        rows[f"{key:064x}"] = draw(arrays.arrays(dtype, shape, elements=finite(dtype)))
    order = draw(st.lists(st.sampled_from(sorted(rows)), max_size=8)) + sorted(rows)
    return kind, dtype, rows, order, draw(st.integers(1, 4)), draw(st.integers(1, 3))


@settings(max_examples=30, deadline=None)
@given(stores())
def test_rows_come_back_bit_for_bit_in_any_order_with_duplicates(drawn: tuple) -> None:
    kind, dtype, rows, order, per_segment, num_writers = drawn
    with tempfile.TemporaryDirectory() as folder:
        for i in range(num_writers):  # each later writer repeats rows of the ones before it
            with SegmentWriter(
                Path(folder),
                kind=kind,
                provenance=PROVENANCE[kind],
                shape=SHAPES[kind],
                dtype=dtype,
                rows=per_segment,
                max_bytes=2**20,
                max_seconds=1e9,
            ) as writer:
                for key in order[i:] if i else order:
                    writer.add(key, rows[key])
        segments = segments_of(Path(folder), kind, FINGERPRINT[kind])
        reader = RowReader.of_segments(Path(folder), kind, segments)
        assert reader.rows.keys() == rows.keys()
        for key, row in rows.items():
            found = reader.read(key)
            assert found.dtype == row.dtype
            assert found.shape == row.shape
            assert found.tobytes() == row.tobytes()  # -0.0 and subnormals too
