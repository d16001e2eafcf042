"""Code blocks of README.md and docs/, and the note above each.

A block of bash, python or toml is run (tests/integration/test_doc_blocks.py), unless a comment in
the line above has another way:

    <!-- not run: REASON -->
    <!-- run by: PATH OF A TEST -->
    <!-- output of: COMMAND -->     for a block of text: COMMAND prints these lines
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = ("bash", "python", "toml")

BLOCK = re.compile(
    r"(?:^ *<!-- (?P<note>[^>]*?) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A block of code or text.

    Attributes:
        page: Name of the page, relative to the root.
        language: Word after the fence.
        text: Lines without the indentation of the fence.
        kind: Word or words before the colon of the note; empty without a note.
        value: Rest of the note.
    """

    page: str
    language: str
    text: str
    kind: str
    value: str

    @property
    def runs(self) -> bool:
        return self.language in LANGUAGES and not self.kind

    def commands(self) -> list[str]:
        """Lines of a shell block without comments and with continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks() -> list[Block]:
    """All blocks, in the order of the pages; README.md first."""
    found = []
    for path in pages():
        for match in BLOCK.finditer(path.read_text()):
            kind, _, value = (match["note"] or "").partition(": ")
            text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
            page = str(path.relative_to(ROOT))
            found.append(Block(page, match["language"], text, kind, value))
    return found
