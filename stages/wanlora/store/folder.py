"""Objects of a cache in a folder of this machine or of a file server.

Owns: every write of a cache in a folder: temporary file, fsync, rename, fsync of the folder, the
order in which a journalled file system needs them. Must not know: Zarr arrays, segments, views.
"""

import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from wanlora.core.fingerprint import sha256_text
from wanlora.errors import StoreError
from wanlora.files import fsync_dir, publish
from wanlora.store.storage import PARTIAL, Entry


@dataclass(frozen=True, slots=True)
class Folder:
    """Storage in a folder. See `Storage` for the methods.

    Attributes:
        path: The folder; made when the first object is written.
        flag: Option that names the folder, for error messages.
    """

    path: Path
    flag: str = "--cache"

    def put(self, key: str, data: bytes) -> None:
        target = self.path / key
        with self._translate_os_errors("write", target):
            try:
                self._put_file(target, data)
            except FileNotFoundError:  # a collection took the temporary file or an empty folder
                self._put_file(target, data)

    def get(self, key: str) -> bytes | None:
        path = self.path / key
        with self._translate_os_errors("read", path):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def get_many(self, keys: Sequence[str]) -> Iterator[bytes | None]:
        return (self.get(key) for key in keys)

    def folders(self, key: str) -> list[str]:
        with self._scanned(self.path / key) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())

    def files(self, key: str) -> list[str]:
        with self._scanned(self.path / key) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())

    def sizes_in_folders(self, key: str, name: str) -> dict[str, int]:
        found = {}
        for folder in self.folders(key):
            path = self.path / key / folder / name
            with (
                self._translate_os_errors("read", path),
                suppress(FileNotFoundError, NotADirectoryError),
            ):
                found[folder] = path.stat().st_size
        return found

    def listing(self, key: str) -> dict[str, Entry]:
        found = {}
        with self._translate_os_errors("list", self.path / key):
            for folder, _, names in os.walk(self.path / key, onerror=_unless_gone):
                for name in names:
                    path = Path(folder) / name
                    with suppress(FileNotFoundError):  # another process removed it
                        stat = path.stat()
                        entry = Entry(stat.st_size, stat.st_mtime)
                        found[path.relative_to(self.path).as_posix()] = entry
        return found

    def remove(self, key: str) -> None:
        self.remove_many([key])

    def remove_many(self, keys: Collection[str]) -> None:
        paths = [self.path / key for key in keys]
        for path in paths:
            with (
                self._translate_os_errors("remove", path),
                suppress(FileNotFoundError, NotADirectoryError),
            ):
                path.unlink()
        for folder in {path.parent for path in paths}:
            with (
                self._translate_os_errors("remove", folder),
                suppress(FileNotFoundError, NotADirectoryError),
            ):
                fsync_dir(folder)

    def remove_tree(self, key: str) -> None:
        path = self.path / key
        with (
            self._translate_os_errors("remove", path),
            suppress(FileNotFoundError, NotADirectoryError),
        ):
            shutil.rmtree(path)

    def remove_trees(self, keys: Collection[str]) -> None:
        for key in keys:
            self.remove_tree(key)

    def remove_empty_folders(self, key: str) -> None:
        for folder, _, _ in os.walk(self.path / key, topdown=False):
            with suppress(OSError):  # it is not empty, or gone
                Path(folder).rmdir()

    def clock(self) -> float:
        key = f"{PARTIAL}/{uuid.uuid4().hex}"
        self.put(key, b"clock")
        try:
            with self._translate_os_errors("read", self.path / key):
                return (self.path / key).stat().st_mtime
        finally:
            self.remove(key)

    def zarr_store(self) -> Any:
        from zarr.storage import LocalStore  # noqa: PLC0415  (slow to import)

        return LocalStore(self.path, read_only=True)

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold an exclusive lock on a key among the processes of this machine.

        On a file system without locks two processes may do the same work. Objects are complete
        there too.

        Raises:
            StoreError: The disk is full or read-only.
        """
        path = self.path / PARTIAL / f"{sha256_text(key)}.lock"
        lock = FileLock(path)
        with self._translate_os_errors("write", path):
            make_folder(path.parent)
            with suppress(NotImplementedError):
                lock.acquire()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # the next holder checks again what was done
            lock.release()

    def _put_file(self, target: Path, data: bytes) -> None:
        temporary = self.path / PARTIAL / uuid.uuid4().hex
        make_folder(temporary.parent)
        make_folder(target.parent)
        try:
            temporary.write_bytes(data)
            publish(temporary, target)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    @contextmanager
    def _scanned(self, path: Path) -> Iterator[Iterator["os.DirEntry[str]"]]:
        with self._translate_os_errors("list", path):
            try:
                entries = os.scandir(path)
            except (FileNotFoundError, NotADirectoryError):
                yield iter(())
                return
            with entries:
                yield entries

    @contextmanager
    def _translate_os_errors(self, verb: str, path: Path) -> Iterator[None]:
        """Turn an error of the disk into one that names the path."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot {verb} {path}: {error.strerror or error}; check the disk's free space and "
                f"the folder's permissions, or choose another folder with {self.flag}"
            ) from error


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; sync the parent of each new folder."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_dir(folder.parent)


def _unless_gone(error: OSError) -> None:
    """Refuse a folder that cannot be listed; os.walk would leave it out."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
