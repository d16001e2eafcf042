"""Write files atomically, and refuse with one error if the disk does not accept the data.

Owns: the temporary name, fsync and rename, and the ways in which libraries report a full disk. A
temporary name starts with a dot and ends with `.partial`, so that no reader takes it for the file.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from wanlora.core.text import LFS_HEAD, spellings
from wanlora.errors import OutputError

DISK_ERRORS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO,
        errno.ESTALE, errno.ETIMEDOUT,
    }
)  # fmt: skip
"""System errors of a disk that refuses data: full, over quota, read-only, over the limit on the
size of a file, not this user's, or broken."""


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


def free_path(path: Path) -> Path:
    """Path itself if nothing has its name, else the first free one of `a-2.mp4`, `a-3.mp4`, ..."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(name for name in chain([path], numbered) if not os.path.lexists(name))


HARMLESS = re.compile(
    r"\.gitkeep|\.gitignore|\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.directory|lost\+found"
    r"|\.ipynb_checkpoints|\.nfs.*|\.lock|.*\.log|nohup\.out|slurm-.*\.out"
)
"""Names that the system, an editor or a launcher leaves in a folder, and no command writes."""


def foreign_files(folder: Path) -> list[str]:
    """List the entries of a folder, if it exists, except `HARMLESS` names and partial files.

    For commands that fill a folder: these entries are not theirs, and may be valuable.
    """
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    return [
        name for name in names if not HARMLESS.fullmatch(name) and not name.endswith(".partial")
    ]


def require_file(path: Path | None, *, flag: str) -> None:
    """Refuse a file that could not be written, before the work for it; `None`: there is no file.

    Args:
        path: File that will be made, with its folders.
        flag: Option that names it, for the message.

    Raises:
        OutputError: A folder has this name, or its folder cannot be made or written.
    """
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected the name of a file for {flag}")
    require_folder(path.parent, flag=flag)


def disk_error(error: BaseException) -> str | None:
    """Return the system's reason if the disk refused data; None for any other error.

    torch's writer puts a RuntimeError without a reason in the place of the OSError that it handles;
    safetensors' error has the number of the system's error in its text.
    """
    cause: BaseException | None = error
    while cause and (isinstance(cause, OutputError) or "inline_container" in str(cause)):
        cause = cause.__cause__ or cause.__context__
    number = cause.errno if isinstance(cause, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(cause))):
        number = int(found[1])
    return os.strerror(number) if number in DISK_ERRORS else None


@contextmanager
def writing(path: Path, *, then: str = "run the command again") -> Iterator[None]:
    """Replace any library's error for a disk that refuses data by one refusal.

    If blocks are nested, the outer one names its path: the inner path may be a temporary one.

    Args:
        path: File or folder that the block writes.
        then: Next action of the user when there is room.

    Raises:
        OutputError: A system error of `DISK_ERRORS`, or a library's error caused by one.
    """
    try:
        yield
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        raise OutputError(
            f"cannot write {path}: {reason}. Check the disk's free space and the folder's "
            f"permissions, or choose another folder, then {then}"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, a kill or a power cut sees the old one or the new one.

    Raises:
        OutputError: The disk refuses it.
    """
    temporary = partial_path(path)
    with writing(path):
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


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is what Git LFS leaves in place of one that it has not fetched."""
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return False
        with path.open("rb") as file:
            return file.read(len(LFS_HEAD)) == LFS_HEAD
    except (OSError, ValueError):
        return False


def existing_spelling(path: Path) -> Path:
    """Path of the file that is there under this or an equivalent name, else the path given.

    The disk is read only for names with backslashes or characters beyond ASCII.
    """
    text = str(path)
    if text.isascii() and "\\" not in text:
        return path
    names = [*spellings(text), *(str(path.with_name(n)) for n in _names(path))]
    return next((Path(name) for name in names if os.path.lexists(name)), path)


def _names(path: Path) -> list[str]:
    """Spellings of the last part alone, for a folder that is spelled in another way."""
    return [name for name in spellings(path.name) if "/" not in name]


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished temporary file, durably."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_dir(path.parent)


def partial_path(path: Path) -> Path:
    """Temporary name beside a file, its own for each process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `path` for making its content; remove it afterwards.

    Its name is the same for each process, so that files of a killed process are found and removed.

    Raises:
        OutputError: The disk refuses it.
    """
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing(path):
            folder.mkdir(parents=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Rename a finished folder, durably; an existing one of that name is moved away first."""
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
