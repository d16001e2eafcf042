"""How files appear: whole, or not at all.

Owns: the temporary name, fsync and rename. A temporary name starts with a dot and ends with
`.partial`, so that no reader takes it for the file.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanlora.core.text import spellings
from wanlora.errors import OutputError


def require_folder(path: Path, *, flag: str) -> None:
    """Refuse a folder that could not be made or written, before hours of work go into it.

    Writes nothing itself.

    Args:
        path: Folder that will be made, with its parents, once there is something to put into it.
        flag: Option that names it, for the message.

    Raises:
        OutputError: A file is in the way, or the folder may not be written.
    """
    absolute = path.absolute()
    there = next(part for part in (absolute, *absolute.parents) if os.path.lexists(part))
    if not there.is_dir():
        problem = f"{there} is {'a file' if there.is_file() else 'no folder'}"
    elif not os.access(there, os.W_OK | os.X_OK):
        problem = f"{there} may not be written by this user, or its disk is read-only"
    else:
        return
    raise OutputError(f"cannot write into {path}: {problem}; choose another folder with {flag}")


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, a kill or a power cut sees the old one or the new one."""
    temporary = partial_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 file as `write_atomic` does; any text can be written (`encode_text`)."""
    write_atomic(path, encode_text(text))


def encode_text(text: str) -> bytes:
    r"""Encode any text as UTF-8.

    A half of a UTF-16 pair, which UTF-8 cannot hold, becomes `\udcff`: the same character in JSON,
    and readable elsewhere.
    """
    return text.encode(errors="backslashreplace")


def existing_spelling(path: Path) -> Path:
    """Path of the file that is there under this or an equivalent name, else the path given.

    The disk is read only for names with backslashes or characters beyond ASCII.
    """
    names = [*spellings(str(path)), *(str(path.with_name(n)) for n in _names(path))]
    if len(set(names)) == 1:
        return path
    return next((Path(name) for name in names if os.path.lexists(name)), path)


def _names(path: Path) -> list[str]:
    """Spellings of the last part alone, for a folder that is spelled in another way."""
    return [name for name in spellings(path.name) if "/" not in name]


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its name, durably."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_dir(path.parent)


def partial_path(path: Path) -> Path:
    """Temporary name beside a file, its own for each process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Give an empty hidden folder beside `path` to make its content in; it is gone afterwards.

    Its name is the same for each process, so that a killed one's leftovers are found and removed.
    """
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Give a finished folder its name, durably; one that has the name is put aside first."""
    fsync_tree(temporary)
    old = path.with_name(f".{path.name}.old.partial")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    fsync_dir(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync_tree(folder: Path) -> None:
    """Make everything in a folder durable."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            fsync_dir(path)
        else:
            with path.open("rb") as opened:
                os.fsync(opened.fileno())
    fsync_dir(folder)


def fsync_dir(path: Path) -> None:
    """Make the renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as `write_atomic` does."""
    write_atomic(path, (json.dumps(value, allow_nan=False) + "\n").encode())
