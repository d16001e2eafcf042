"""The mark of a page that a command wrote, and the check that nothing else is replaced by a page.

Owns: the mark, which names the command and the sha256 of the rest of the page. Must not know: what
a page shows.
"""

import hashlib
import re
from pathlib import Path

from wanlora.errors import OutputError
from wanlora.files import encode_text, require_file

_MARK = '<meta name="generator" content="wanlora {command}, sha256 {digest}">\n'
_MARKED = re.compile(
    re.escape(_MARK)
    .replace(r"\{command\}", "(?P<command>[a-z-]+)")
    .replace(r"\{digest\}", "(?P<digest>[0-9a-f]{16})")
    .encode()
)
_HEAD_BYTES = 4096


def marked(page: str, command: str) -> str:
    """Put the mark of a command into a page.

    Args:
        page: From `page.page`, without a mark.
        command: Its name, for example `prepare`.
    """
    mark = _MARK.format(command=command, digest=_digest(encode_text(page)))
    return page.replace("<head>", f"<head>{mark}", 1)


def require_own_page(path: Path | None, command: str, *, flag: str) -> None:
    """Refuse to replace a file, unless it is an unedited page of the same command.

    Args:
        path: File that will be written; None = no file is written.
        command: Name of the command that writes it.
        flag: Option that names it, for the message.

    Raises:
        OutputError: Something else is there, or the file cannot be written.
    """
    require_file(path, flag=flag)
    if path is None or not path.exists() or _command_of(path) == command:
        return
    raise OutputError(
        f"{path} exists and is not an unedited page of wanlora {command}, so it is not replaced: "
        f"choose another name with {flag}, or move the file away"
    )


def _command_of(path: Path) -> str | None:
    """Command that wrote a page; None for an edited page and for any other file."""
    data = path.read_bytes() if path.is_file() else b""
    found = _MARKED.search(data[:_HEAD_BYTES])
    if (
        found is None
        or _digest(data[: found.start()] + data[found.end() :]) != found["digest"].decode()
    ):
        return None
    return found["command"].decode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
