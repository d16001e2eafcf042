"""Rows of caption tables edited at random, in each format: used or listed, no error escapes."""

import csv
import io
import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_manifest_lines import ANY_TEXT, VALUES
from wanlora.data.captions import find
from wanlora.errors import MEDIA_ERROR_CODES, ManifestError

ROW = {"path": "b.mp4", "caption": "two", "label": "run", "split": "val", "weight": 2}
NAMES = [*ROW, "video", "text", "group", "prompt"]

rows = st.lists(
    st.dictionaries(st.sampled_from(NAMES) | ANY_TEXT, VALUES | st.sampled_from([*ROW.values()])),
    max_size=4,
)


def as_csv(edited) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["path", "caption", "label"])
    writer.writerow(["a.mp4", "one", ""])
    for row in edited:
        writer.writerow([*row, *map(str, row.values())])
    return buffer.getvalue().encode(errors="surrogatepass")


FORMATS = {
    "metadata.jsonl": lambda table: "\n".join(map(json.dumps, table)).encode(),
    "metadata.json": lambda table: json.dumps(table).encode(),
    "metadata.csv": lambda table: as_csv(table[1:]),
}


@given(rows, st.sampled_from(sorted(FORMATS)), st.binary(max_size=20))
@settings(max_examples=150, deadline=None)
def test_good_rows_are_used_and_bad_ones_listed_in_every_format(edited, name, tail):
    with tempfile.TemporaryDirectory() as given_folder:
        folder = Path(given_folder)
        for video in ("a.mp4", "b.mp4"):
            (folder / video).touch()
        table = [{"path": "a.mp4", "caption": "one"}, *edited]
        extra = b"\n" + tail if name == "metadata.jsonl" else b""
        (folder / name).write_bytes(FORMATS[name](table) + extra)
        (folder / "b.txt").write_bytes(tail)
        try:
            found = find([folder], None)
        except ManifestError as error:
            assert str(error).encode()  # noqa: PT017
            return
    for failure in found.failures:
        assert failure.code in MEDIA_ERROR_CODES
        assert failure.message.encode()
    for source in found.sources:
        assert all(text.strip() and text.encode() for text in source.prompts)
        assert source.activity.encode() is not None
