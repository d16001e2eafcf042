"""Thirteen habits that make the text hard to read are counted. A ceiling may only be lowered.

A document is README.md, CONTRIBUTING.md or a page of docs/, without code and generated parts. A
code text is a docstring, another string or a comment under stages/.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = ("configuration.md",)

START = r"(?:^|[.:;|(] )"
"""Start of a sentence, a phrase or a cell of a table."""

UNITS = (
    r"batch|block|bucket|card|clip|cell|core|day|download|epoch|file|GPU|hour|kill|layer|line|"
    r"machine|micro-batch|minute|module|node|optimizer step|prefix|process|prompt|rank|request|"
    r"row|run|second|segment|step|time|token|video|worker"
)

HABITS = {
    "a program says, tells, asks, knows": (
        r"\b(?:says?|said|tells?|told|asks?|asked|speaks?|hears?|heard|knows?|knew|believes?|"
        r"believed|promises)\b(?<!Must not know)(?<!must not know)"
    ),
    "a phrase that opens with What, Which, How, Where or Whether": (
        START + r"(?:\w+: )?(?:What|Which|How|Where|Whether|Why)\b(?![^.]*\?)"
    ),
    # `where` is also the name of an argument: the place that an error names.
    "where for if, when or for": r"(?<!`)\bwhere\b(?!: )",
    "values that stand, lie or sit": r"\b(?:stands?|stood|lies?|sits?|lay)\b(?! still)",
    "whoever, whatever, nobody": (
        r"\b(?:whoever|whatever|whichever|wherever|anybody|nobody|somebody|everybody)\b"
    ),
    "Of each X, the Y": START + r"Of (?:an?|all|each|every|its|one|several|the|those|what)\b",
    "is no X": r"(?<![Tt]here )\b(?:is|are|was|were) (?:no|none)\b",
    "a for per": (
        r"\b(?:\d[\d.,]*|one|two|bytes|clips|FLOPs?|GB|GETs|hours|kB|lines?|MB|micro-batches|ms|"
        r"numbers|objects|processes|requests?|rows?|s|seconds|steps|times?|tokens|values|videos|"
        rf"widths) an? (?:{UNITS})\b"
    ),
    "archaic words": (
        r"\b(?:dear(?:er|est)?|ever after|foretells?|anew|mend(?:s|ed|ing)?|befalls?|for want of|"
        r"alike|likewise|to be had|lest)\b"
    ),
    "Most X for maximum": START + r"(?:Most|Least|Fewest) (?!of|often)\w+",
    ", as `x` for an example": r", as `",
    "so many for a number": r"\b[Ss]o many\b",
    "but for, all but": r"\b(?:[Bb]ut for|[Aa]ll but)\b",
}

CEILING = {"documents": 3, "code": 0}
"""Maximum number of places. Lower a number after you removed some."""


def prose(markdown: str) -> str:
    """A page without code, comments, headings, addresses of links and marked generated parts."""
    for pattern in (
        r"```.*?```", r"<!-- generated.*?<!-- end -->", r"<!--.*?-->", r"(?<=\])\([^)]*\)",
    ):  # fmt: skip
        markdown = re.sub(pattern, "", markdown, flags=re.DOTALL)
    markdown = re.sub(r"^(?:#+ | {4}\S).*$", "", markdown, flags=re.MULTILINE)
    # One line per paragraph: a phrase may go on in the next line.
    markdown = re.sub(r"\n(?!\n|\||[-*\d] ?)", " ", markdown)
    return re.sub(r"`[^`]+`", "`x`", markdown)


def documents() -> Iterator[tuple[str, str]]:
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name not in GENERATED]
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(pages)]:
        yield str(path.relative_to(ROOT)), prose(path.read_text())


def code() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "stages").rglob("*.py")):
        source = path.read_text()
        texts = [
            node.value
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
        ]
        texts += [
            token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        ]
        for text in texts:
            yield str(path.relative_to(ROOT)), re.sub(r"\n\s*(?!\w+: |\n)", " ", text)


def found(texts: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """Places of each habit: file, and the words around."""
    places: dict[str, list[str]] = {habit: [] for habit in HABITS}
    for name, text in texts:
        for habit, pattern in HABITS.items():
            for match in re.finditer(pattern, text, re.MULTILINE):
                around = text[max(0, match.start() - 30) : match.end() + 30]
                places[habit].append(f"{name}: …{' '.join(around.split())}…")
    return places


@pytest.mark.parametrize(("kind", "texts"), [("documents", documents), ("code", code)])
def test_habits_only_become_fewer(kind: str, texts: Callable[[], Iterator[tuple[str, str]]]):
    places = found(texts())
    count = sum(map(len, places.values()))
    lines = [f"{habit}: {len(of)}\n  " + "\n  ".join(of[:8]) for habit, of in places.items() if of]
    assert count <= CEILING[kind], "\n".join(lines)


@pytest.mark.parametrize(
    ("habit", "text"),
    list(zip(
        HABITS,
        (
            "the page says so", "Whether it fits.", "the sizes where they differ",
            "The file lies there", "whoever made it", "Of each bucket, the clips", "it is no video",
            "one line a clip", "the dearest batch", "Most rows in a segment", ", as `x`", "so many",
            "all but the first",
        ),
        strict=True,
    )),
)  # fmt: skip
def test_each_habit_is_found(habit: str, text: str):
    assert re.search(HABITS[habit], text, re.MULTILINE)
