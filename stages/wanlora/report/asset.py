"""Style sheets and scripts of the pages: the files in `assets/`.

Owns: their folder, and the numbers in them. They are written into each page, so that a page is
one file.
"""

import re
from functools import cache
from importlib.resources import files


def asset(name: str, **numbers: int) -> str:
    """Return a file of `assets/`, on lines of its own.

    Args:
        name: Name of the file.
        numbers: Word in the file to the number that replaces it, such as `MIN=2`.
    """
    text = _read(name)
    for word, number in numbers.items():
        text, count = re.subn(rf"\b{word}\b", str(number), text)
        assert count, (name, word)
    return text


def style(*names: str) -> str:
    """Return style sheets of `assets/` as an element of a page."""
    return f"<style>{''.join(map(asset, names))}</style>"


@cache
def _read(name: str) -> str:
    return "\n" + files("wanlora.report").joinpath("assets", name).read_text(encoding="utf-8")
