"""Each code block of the documents is run by a test, or has a reason above it."""

import shlex

import pytest

from tests.support.doc_blocks import LANGUAGES, ROOT, blocks

REASONS = (
    "needs a GPU", "needs an object store", "needs the hub", "needs several processes",
    "needs two machines", "needs a stopped run", "installs packages", "another tool",
    "needs files of other tools",
)  # fmt: skip


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.page}: {block.text[:40]}")
def test_each_block_is_run_or_has_a_reason(block):
    if block.kind == "not run":
        assert block.value.startswith(REASONS), block.value
    elif block.kind == "run by":
        assert block.page.removeprefix("docs/") in (ROOT / block.value).read_text()
    elif block.kind == "output of":
        assert shlex.split(block.value)[0] == "wanlora"
    else:
        assert not block.kind
        # Figures, file lists and output have no language; code has one that is run.
        assert block.language in ("", *LANGUAGES), block.language
        assert block.language or not block.text.startswith("wanlora "), block.text
