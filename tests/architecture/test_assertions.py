"""Assertions that quote a sentence are counted. The ceiling may only be lowered.

A test asserts the class or exit code of an error, the name of the thing, its numbers and the
command that fixes it, so a message can be reworded without a change of its test.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

WORD = re.compile(r"(?<![\w/.-])[a-z]{2,}(?![\w/.=-])")
"""Plain lower-case word: no part of a path, an option, a setting or an identifier."""

MIN_WORDS = 4
"""Number of plain words from which a string counts as a sentence."""

CEILING = 33
"""Maximum number of quotes. Those left are captions, settings, states and commands."""


def quotes(source: str) -> Iterator[tuple[int, str]]:
    """Find sentences in `assert` statements and in `match=` patterns: line and text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            asserted: ast.expr = node.test
        elif isinstance(node, ast.keyword) and node.arg == "match":
            asserted = node.value
        else:
            continue
        constants = (part for part in ast.walk(asserted) if isinstance(part, ast.Constant))
        for part in constants:
            if isinstance(part.value, str) and len(WORD.findall(part.value)) >= MIN_WORDS:
                yield part.lineno, part.value


def test_quoted_sentences_only_become_fewer():
    found = [
        f"{path.relative_to(TESTS)}:{line}: {text}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, text in quotes(path.read_text())
    ]
    assert len(found) <= CEILING, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ('assert "no video or folder at x" in message', 1),
        ('with pytest.raises(ValueError, match="no video or folder at x"): pass', 1),
        ('assert f"no video or folder at {path}" in message', 1),
        ('assert message, "no video or folder at x"', 0),
        ('assert "wanlora verify --cache out/cache --set lora.rank=4" in message', 0),
    ],
)
def test_a_quoted_sentence_is_found_and_a_command_is_not(source: str, number: int):
    assert len(list(quotes(source))) == number
