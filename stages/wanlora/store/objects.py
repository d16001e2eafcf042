"""Objects of a cache: atomic put, get, listing and removal, in a folder or in an object store.

Owns: every write of a cache. An object is a key (`/` between names) under a root; it is whole or
absent, whatever happens to the machine. Must not know: Zarr, segments, views. A root that is a URL
is the business of `remote`, with the same promises.
"""

import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from wanlora.core.fingerprint import sha256_text
from wanlora.core.location import Location, Url
from wanlora.errors import StoreError
from wanlora.files import fsync_dir, publish
from wanlora.store import remote

PARTIAL = ".partial"
"""Folder of half-written files, beside the store and the views: no reader ever looks into it."""

REQUESTS = 64
"""Requests at once to an object store: at 100 ms each, 640 a second."""

HELD = 16 * REQUESTS
"""Objects fetched ahead of whoever uses them."""


FEW = 16
"""Folders that are listed one by one; more are found in a listing of their parent."""


class Entry(NamedTuple):
    """An object's size, and when it was written (seconds since 1970)."""

    num_bytes: int
    written: float


def put(root: Location, key: str, data: bytes, *, flag: str = "--cache") -> None:
    """Write an object: it appears whole, and stays through a power cut, or not at all.

    In a folder: temporary file, fsync, rename, fsync of the folder, the order that a journalled
    file system needs for both promises.

    Args:
        root: Folder or URL.
        key: Of the object.
        data: All of it.
        flag: Option that names the folder, for the message.

    Raises:
        StoreError: The disk is full, read-only or broken, or the object store refuses; names it.
    """
    if isinstance(root, Url):
        remote.put(root, key, data)
        return
    target = root / key
    with _naming("write", target, flag):
        try:
            _put_file(root, target, data)
        except FileNotFoundError:  # a collection took the temporary file or an empty folder
            _put_file(root, target, data)


def _put_file(root: Path, target: Path, data: bytes) -> None:
    temporary = root / PARTIAL / uuid.uuid4().hex
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
def locked(root: Path, key: str, *, flag: str = "--cache") -> Iterator[None]:
    """Keep this machine's other processes from doing the same to a key meanwhile.

    A file system without locks keeps nobody out: work is then done twice, and still appears whole.

    Raises:
        StoreError: The disk is full or read-only.
    """
    path = root / PARTIAL / f"{sha256_text(key)}.lock"
    lock = FileLock(path)
    with _naming("write", path, flag):
        make_folder(path.parent)
        with suppress(NotImplementedError):
            lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # whoever waits for it looks again at what was done
        lock.release()


def get(root: Location, key: str) -> bytes | None:
    """Read an object, or None when there is none.

    Raises:
        StoreError: It exists and cannot be read; names the path.
    """
    if isinstance(root, Url):
        return remote.get(root, key)
    path = root / key
    with _naming("read", path):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


def get_many(root: Location, keys: Sequence[str]) -> Iterator[bytes | None]:
    """Read objects in order; many requests at once where each is a round trip.

    No more than `HELD` of them are in memory, however slowly they are taken.
    """
    if not isinstance(root, Url):
        yield from (get(root, key) for key in keys)
        return
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="get") as pool:
        for first in range(0, len(keys), HELD):
            yield from pool.map(lambda key: get(root, key), keys[first : first + HELD])


def folders(root: Location, key: str) -> list[str]:
    """Names of the folders directly under a key, sorted; none when it does not exist."""
    if isinstance(root, Url):
        return remote.names(root, key)[0]
    with _scanned(root / key) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def files(root: Location, key: str) -> list[str]:
    """Names of the objects directly under a key, sorted; none when it does not exist."""
    if isinstance(root, Url):
        return remote.names(root, key)[1]
    with _scanned(root / key) as entries:
        return sorted(entry.name for entry in entries if entry.is_file())


def sizes_in_folders(root: Location, key: str, name: str) -> dict[str, int]:
    """Bytes of the object of this name in each folder directly under a key, where it is there."""
    if isinstance(root, Url):
        sizes = {path: size for path, (size, _) in remote.listing(root, key).items()}
        parts = ((path.removeprefix(f"{key}/").split("/"), size) for path, size in sizes.items())
        return {folder: size for (folder, *rest), size in parts if rest == [name]}
    found = {}
    for folder in folders(root, key):
        path = root / key / folder / name
        with _naming("read", path), suppress(FileNotFoundError, NotADirectoryError):
            found[folder] = path.stat().st_size
    return found


def listing(root: Location, key: str) -> dict[str, Entry]:
    """Every object under a key, by its key."""
    if isinstance(root, Url):
        return {name: Entry(*found) for name, found in remote.listing(root, key).items()}
    found = {}
    with _naming("list", root / key):
        for folder, _, names in os.walk(root / key, onerror=_unless_gone):
            for name in names:
                path = Path(folder) / name
                with suppress(FileNotFoundError):  # another process removed it
                    stat = path.stat()
                    found[path.relative_to(root).as_posix()] = Entry(stat.st_size, stat.st_mtime)
    return found


def num_bytes(root: Location, key: str) -> int:
    """Sum of the sizes of all objects under a key."""
    return sum(entry.num_bytes for entry in listing(root, key).values())


def remove(root: Location, key: str) -> None:
    """Remove an object for good; one that does not exist is ignored.

    Raises:
        StoreError: The disk or the object store refuses.
    """
    remove_many(root, [key])


def remove_many(root: Location, keys: Collection[str]) -> None:
    """Remove objects for good, in one request per 1,000 where the object store can do that.

    Raises:
        StoreError: The disk or the object store refuses.
    """
    if isinstance(root, Url):
        remote.remove(root, list(keys))
        return
    for key in keys:
        with _naming("remove", root / key), suppress(FileNotFoundError, NotADirectoryError):
            (root / key).unlink()
    for folder in {(root / key).parent for key in keys}:
        with _naming("remove", folder), suppress(FileNotFoundError, NotADirectoryError):
            fsync_dir(folder)


def remove_tree(root: Location, key: str) -> None:
    """Remove every object under a key, and their folder.

    Raises:
        StoreError: The disk or the object store refuses.
    """
    if isinstance(root, Url):
        remote.remove(root, list(remote.listing(root, key)))
        return
    with _naming("remove", root / key), suppress(FileNotFoundError, NotADirectoryError):
        shutil.rmtree(root / key)


def remove_trees(root: Location, keys: Collection[str]) -> None:
    """Remove every object under each key.

    Raises:
        StoreError: The disk or the object store refuses.
    """
    if not isinstance(root, Url):
        for key in keys:
            remove_tree(root, key)
        return
    names: dict[str, set[str]] = {}
    for key in keys:
        parent, _, name = key.rpartition("/")
        names.setdefault(parent, set()).add(name)
    found: list[str] = []
    for parent, inside in names.items():
        if len(inside) < FEW:
            found += [key for name in inside for key in remote.listing(root, f"{parent}/{name}")]
        else:  # one listing of all of them
            below = len(parent) + 1
            listed = remote.listing(root, parent)
            found += [key for key in listed if key[below:].split("/", 1)[0] in inside]
    remote.remove(root, found)


def remove_empty_folders(root: Location, key: str) -> None:
    """Remove a folder and those in it as far as they are empty; an object store has none."""
    if isinstance(root, Url):
        return
    for folder, _, _ in os.walk(root / key, topdown=False):
        with suppress(OSError):  # it is not empty, or gone
            Path(folder).rmdir()


def clock(root: Location) -> float:
    """Read the clock that dates objects, in seconds since 1970; writes and removes a small object.

    An object store or a file server has a clock of its own: the age of an object is only known
    relative to it.

    Raises:
        StoreError: The disk or the object store refuses.
    """
    key = f"{PARTIAL}/{uuid.uuid4().hex}"
    put(root, key, b"clock")
    try:
        if isinstance(root, Url):
            return remote.written(root, key)
        with _naming("read", root / key):
            return (root / key).stat().st_mtime
    finally:
        remove(root, key)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each of them synced into the folder above it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_dir(folder.parent)


def _unless_gone(error: OSError) -> None:
    """Refuse a folder that cannot be listed; os.walk would leave it out."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextmanager
def _scanned(path: Path) -> Iterator[Iterator["os.DirEntry[str]"]]:
    with _naming("list", path):
        try:
            entries = os.scandir(path)
        except (FileNotFoundError, NotADirectoryError):
            yield iter(())
            return
        with entries:
            yield entries


@contextmanager
def _naming(verb: str, path: Path, flag: str = "--cache") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot {verb} {path}: {error.strerror or error}; check the disk's free space and "
            f"the folder's permissions, or choose another folder with {flag}"
        ) from error
