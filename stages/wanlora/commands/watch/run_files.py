"""Read files below one folder: no symbolic link is followed, and nothing is written.

Owns: the containment, the search for runs, and the limits of size. Must not know what a file means.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from wanlora.runs.run_folder import LOCK_NAME, METRICS_NAME, STATUS_NAME

MAX_DEPTH = 3
"""Levels of folders that are searched for runs: `outputs/demo/run` is on the second."""
MAX_FOLDERS = 5_000
MAX_BYTES = 256 * 2**20
"""About 800,000 rows of metrics.jsonl."""


class Version(NamedTuple):
    """Identity of a file's content, as far as the disk reports it."""

    inode: int
    mtime_ns: int
    size: int


@dataclass(frozen=True, slots=True)
class Found:
    """Runs of a folder.

    Attributes:
        runs: Names: paths relative to the folder, or the folder's own name if it is itself a run.
        links: Symbolic links that were not followed.
        is_cut: The search ended at `MAX_FOLDERS` folders.
    """

    runs: tuple[str, ...]
    links: tuple[str, ...]
    is_cut: bool


class _Entry(NamedTuple):
    name: str
    kind: Literal["link", "folder", "file", "other"]


class Folder:
    """A folder whose files are read; every path is relative to it.

    Args:
        root: The folder. It may itself be a symbolic link. If it is itself a run, paths start with
            its name.
    """

    def __init__(self, root: Path) -> None:
        root = root.resolve()
        names = {path.name for path in root.iterdir()}
        is_run = bool(names & {METRICS_NAME, STATUS_NAME})
        self._root, self._start = (root.parent, root.name) if is_run else (root, ".")

    def find_runs(self) -> Found:
        """Search for runs. Folders inside a run and hidden folders are not searched."""
        runs: list[str] = []
        links: list[str] = []
        waiting = [(self._start, 0)]
        seen = 0
        while waiting and seen < MAX_FOLDERS:
            name, depth = waiting.pop()
            seen += 1
            entries = self._entries(name)
            if {METRICS_NAME, STATUS_NAME} & {each.name for each in entries}:
                runs.append(name)
                continue
            for entry in entries:
                path = entry.name if name == "." else f"{name}/{entry.name}"
                if entry.kind == "link":
                    links.append(path)
                elif entry.kind == "folder" and depth < MAX_DEPTH:
                    waiting.append((path, depth + 1))
        return Found(tuple(sorted(runs)), tuple(sorted(links)), bool(waiting))

    def folders(self, name: str) -> list[str]:
        """Names of the folders in a folder; none if it is not there."""
        return sorted(entry.name for entry in self._entries(name) if entry.kind == "folder")

    def files(self, name: str) -> list[str]:
        """Names of the files in a folder; none if it is not there."""
        return sorted(entry.name for entry in self._entries(name) if entry.kind == "file")

    def version(self, path: str) -> Version | None:
        """Identity of a regular file's content; None if there is no such file."""
        descriptor = self._open(path)
        if descriptor is None:
            return None
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        return Version(found.st_ino, found.st_mtime_ns, found.st_size)

    def read(self, path: str, *, start: int = 0, max_bytes: int = MAX_BYTES) -> bytes | None:
        """Read a regular file; None if there is no such file or it exceeds the limit.

        Args:
            path: Relative to the folder.
            start: Bytes to leave out.
            max_bytes: Limit of what is read.
        """
        descriptor = self._open(path)
        if descriptor is None:
            return None
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size - start
            file.seek(start)
            return file.read(max(size, 0)) if size <= max_bytes else None

    def read_end(self, path: str, num_bytes: int) -> bytes | None:
        """Last bytes of a regular file of any size; None if there is no such file."""
        descriptor = self._open(path)
        if descriptor is None:
            return None
        with os.fdopen(descriptor, "rb") as file:
            file.seek(max(0, os.fstat(descriptor).st_size - num_bytes))
            return file.read(num_bytes)

    def read_start(self, path: str, num_bytes: int) -> bytes | None:
        """First bytes of a regular file of any size; None if there is no such file."""
        descriptor = self._open(path)
        if descriptor is None:
            return None
        with os.fdopen(descriptor, "rb") as file:
            return file.read(num_bytes)

    def is_locked(self, run: str) -> bool | None:
        """Return whether a process holds the lock of a run; None if the disk does not report it.

        Holds a shared lock for some microseconds.
        """
        descriptor = self._open(f"{run}/{LOCK_NAME}")
        if descriptor is None:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return True if error.errno in (errno.EAGAIN, errno.EACCES) else None
        finally:
            os.close(descriptor)
        return False

    def _entries(self, name: str) -> list[_Entry]:
        """Entries of a folder that are not hidden; none if it is gone or may not be read."""
        descriptor = self._open(name, is_folder=True)
        if descriptor is None:
            return []
        try:
            with os.scandir(descriptor) as entries:
                return [_Entry(each.name, _kind(each)) for each in entries if each.name[0] != "."]
        except OSError:
            return []
        finally:
            os.close(descriptor)

    def _open(self, path: str, *, is_folder: bool = False) -> int | None:
        """Open a file or folder, each part of its path without following a link.

        Returns:
            A descriptor, or None if there is no regular file (or folder) of this path here.
        """
        parts = [part for part in path.split("/") if part != "."]
        if any(part in ("", "..") or "\0" in part for part in parts):
            return None
        try:
            return _descend(self._root, parts, is_folder=is_folder)
        except OSError:
            return None


def _kind(entry: os.DirEntry[str]) -> Literal["link", "folder", "file", "other"]:
    if entry.is_symlink():
        return "link"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "other"


def _descend(root: Path, parts: Sequence[str], *, is_folder: bool) -> int | None:
    inside = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for number, part in enumerate(parts, 1):
        last = number == len(parts) and not is_folder
        # Opening a pipe would wait for its writer without O_NONBLOCK.
        flags = inside | (os.O_NONBLOCK if last else os.O_DIRECTORY)
        try:
            inner = os.open(part, flags, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    if not is_folder and not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return descriptor
