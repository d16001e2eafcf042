"""Objects of a cache in an object store (S3, GCS, Azure and others that obstore opens).

Owns: every call of obstore. A PUT, or the end of an upload in parts, makes an object appear whole.
Credentials and endpoint come from the environment (docs/cache.md). obstore repeats
requests after temporary failures (5xx, a broken connection). Must not be used across a fork.
"""

import functools
import os
import uuid
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from wanlora.core.location import Url
from wanlora.errors import StoreError
from wanlora.store.storage import PARTIAL, Entry

MAX_RETRIES = 6
"""Maximum number of retries of a request, with waits that grow from 0.1 s to 5 s."""

PART_BYTES = 8 * 2**20
"""Part size for larger objects. Each part is a request with its own timeout, so the transfer of an
object of any size continues as long as parts arrive."""

PARTS_AT_ONCE = 4
"""Number of parts of one object in transfer at once."""

REQUEST_S = 120
"""Timeout of a request: four parts of 8 MiB at once need 0.28 MB/s. (obstore's default is 30 s for
a whole object: a segment of 118 MB would need 4 MB/s.)"""

RETRY_S = 10 * 60
"""Maximum time from a request's first try to its last retry."""

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


REQUESTS = 64
"""Number of concurrent requests to an object store: 640 per second at 100 ms each."""

HELD = 16 * REQUESTS
"""Number of objects that `get_many` fetches ahead of its caller."""

FEW = 16
"""Folders that are listed one by one; more are found in a listing of their parent."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Storage in an object store. See `Storage` for the methods.

    Attributes:
        url: Address of the bucket, with a prefix for all keys.
    """

    url: Url

    def put(self, key: str, data: bytes) -> None:
        """Write an object with one request, or in parts, which appear together with the last."""
        store = open_store(self.url)
        import obstore  # noqa: PLC0415

        with _translate_os_errors("write", self.url / key):
            obstore.put(
                store,
                key,
                data,
                use_multipart=len(data) > PART_BYTES,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )

    def get(self, key: str) -> bytes | None:
        store = open_store(self.url)
        import obstore  # noqa: PLC0415
        from obstore.exceptions import PreconditionError  # noqa: PLC0415

        with _translate_os_errors("read", self.url / key):
            for tries_left in reversed(range(MAX_RETRIES)):
                try:
                    found = obstore.get(store, key)
                    if found.meta["size"] <= PART_BYTES:
                        return bytes(found.bytes())
                    return _get_in_parts(store, key, found.meta)
                except FileNotFoundError:
                    return None
                except PreconditionError:  # it was replaced meanwhile: read the new one
                    if not tries_left:
                        raise
        raise AssertionError("every try returns or raises")

    def get_many(self, keys: Sequence[str]) -> Iterator[bytes | None]:
        """Read objects in order. At most `HELD` of them are in memory."""
        with ThreadPoolExecutor(REQUESTS, thread_name_prefix="get") as pool:
            for first in range(0, len(keys), HELD):
                yield from pool.map(self.get, keys[first : first + HELD])

    def folders(self, key: str) -> list[str]:
        prefixes = self._directly_under(key)["common_prefixes"]
        return sorted(prefix.rsplit("/", 1)[-1] for prefix in prefixes)

    def files(self, key: str) -> list[str]:
        objects = self._directly_under(key)["objects"]
        return sorted(meta["path"].rsplit("/", 1)[-1] for meta in objects)

    def sizes_in_folders(self, key: str, name: str) -> dict[str, int]:
        below = len(key) + 1
        parts = ((k[below:].split("/"), entry) for k, entry in self.listing(key).items())
        return {folder: entry.num_bytes for (folder, *rest), entry in parts if rest == [name]}

    def listing(self, key: str) -> dict[str, Entry]:
        store = open_store(self.url)
        import obstore  # noqa: PLC0415

        with _translate_os_errors("list", self.url / key):
            return {
                meta["path"]: Entry(meta["size"], meta["last_modified"].timestamp())
                for page in obstore.list(store, key)
                for meta in page
            }

    def remove(self, key: str) -> None:
        self.remove_many([key])

    def remove_many(self, keys: Collection[str]) -> None:
        """Remove objects, 1,000 per request if the server can do that."""
        store, keys = open_store(self.url), list(keys)
        import obstore  # noqa: PLC0415

        if not keys:
            return
        with _translate_os_errors("remove", self.url / keys[0]):
            try:
                obstore.delete(store, keys)
            except FileNotFoundError:  # of a server without bulk requests, which stops there
                for key in keys:
                    with suppress(FileNotFoundError):
                        obstore.delete(store, key)

    def remove_tree(self, key: str) -> None:
        self.remove_many(self.listing(key))

    def remove_trees(self, keys: Collection[str]) -> None:
        names: dict[str, set[str]] = {}
        for key in keys:
            parent, _, name = key.rpartition("/")
            names.setdefault(parent, set()).add(name)
        found: list[str] = []
        for parent, inside in names.items():
            if len(inside) < FEW:
                found += [key for name in inside for key in self.listing(f"{parent}/{name}")]
            else:  # one listing of all of them
                below, listed = len(parent) + 1, self.listing(parent)
                found += [key for key in listed if key[below:].split("/", 1)[0] in inside]
        self.remove_many(found)

    def remove_empty_folders(self, key: str) -> None:
        """Do nothing: an object store has no folders."""

    def clock(self) -> float:
        store, key = open_store(self.url), f"{PARTIAL}/{uuid.uuid4().hex}"
        import obstore  # noqa: PLC0415

        self.put(key, b"clock")
        try:
            with _translate_os_errors("read", self.url / key):
                return float(obstore.head(store, key)["last_modified"].timestamp())
        except FileNotFoundError:
            raise StoreError(f"{self.url / key} is gone right after it was written") from None
        finally:
            self.remove(key)

    def zarr_store(self) -> Any:
        from zarr.storage import ObjectStore  # noqa: PLC0415  (slow to import)

        return ObjectStore(open_store(self.url), read_only=True)

    def _directly_under(self, key: str) -> Any:
        store = open_store(self.url)
        import obstore  # noqa: PLC0415

        with _translate_os_errors("list", self.url / key):
            return obstore.list_with_delimiter(store, key)


@functools.cache
def open_store(root: Url) -> Any:
    """Open an obstore store with keys relative to the root, once per root and process.

    Raises:
        StoreError: obstore is not installed, or does not support this address.
    """
    try:
        from obstore.store import from_url  # noqa: PLC0415  (an optional extra)
    except ImportError:
        raise StoreError(
            f"{root} needs obstore; install it with: pip install 'wanlora[s3]'"
        ) from None
    plain_http = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
    retry: Any = {
        "max_retries": MAX_RETRIES,
        "backoff": {
            "base": 2,
            "init_backoff": timedelta(seconds=0.1),
            "max_backoff": timedelta(seconds=5),
        },
        "retry_timeout": timedelta(seconds=RETRY_S),
    }
    client: Any = {"timeout": timedelta(seconds=REQUEST_S)}
    if plain_http:
        client["allow_http"] = True
    options: Any = {"client_options": client, "retry_config": retry}
    if str(root).startswith("memory:"):
        options = {}
    with _translate_os_errors("open", root):
        return from_url(str(root), **options)


def _get_in_parts(store: Any, key: str, meta: Any) -> bytes:
    import obstore  # noqa: PLC0415

    size, version = int(meta["size"]), meta["e_tag"]

    def part(start: int) -> bytes:
        options: Any = {"range": (start, min(start + PART_BYTES, size))}
        if version is not None:
            options["if_match"] = version
        return bytes(obstore.get(store, key, options=options).bytes())

    with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="get-part") as pool:
        return b"".join(pool.map(part, range(0, size, PART_BYTES)))


def is_refusal(error: BaseException) -> bool:
    """Return whether the object store raised the error, and not the parsing of its data."""
    return type(error).__module__.startswith("obstore")


@contextmanager
def _translate_os_errors(verb: str, where: Url) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            raise
        reason = str(error).split("\n\nDebug source:")[0].strip()[:600]
        raise StoreError(f"cannot {verb} {where}: {reason}; {_advice(str(error))}") from error


def _advice(error: str) -> str:
    """Suggest a fix. Searches the error's text, because its type may not name the cause."""
    if "timed out" in error.lower() or "timedout" in error.lower():
        return (
            f"a request took longer than {REQUEST_S:g} s. Objects travel in parts of "
            f"{PART_BYTES / 1e6:.1f} MB, {PARTS_AT_ONCE} at once, so this process got less than "
            f"{PARTS_AT_ONCE * PART_BYTES / 1e6 / REQUEST_S:.2f} MB/s, or the server does not "
            "answer: check the address and the network, or run fewer processes at once"
        )
    return (
        "check the address, the network and the credentials in the environment (for S3: "
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and AWS_ENDPOINT_URL for a server "
        "of your own)"
    )
