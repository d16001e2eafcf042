"""Objects of a cache in an object store (S3, GCS, Azure, and whatever else obstore opens).

Owns: every call of obstore. A PUT, or the end of an upload in parts, makes an object appear whole.
Credentials and endpoint come from the environment (docs/cache.md). Requests that fail in a way
that may pass (5xx, a broken connection) are repeated by obstore. Must not be used across a fork.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from wanlora.core.location import Url
from wanlora.errors import StoreError

MAX_RETRIES = 6
"""Repeats of a request, with waits of 0.1 s growing to 5 s."""

PART_BYTES = 8 * 2**20
"""Size of the parts in which larger objects travel, each a request with a timeout of its own: a
transfer goes on as long as parts arrive, whatever the size of the object."""

PARTS_AT_ONCE = 4
"""Parts of one object in transfer."""

REQUEST_S = 120
"""Timeout of a request: four parts of 8 MiB at once need 0.28 MB/s. (obstore's default is 30 s for
a whole object: a segment of 118 MB would need 4 MB/s.)"""

RETRY_S = 10 * 60
"""A request is not repeated once this much time has passed since its first try."""

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


@functools.cache
def open_store(root: Url) -> Any:
    """Open an obstore store whose keys are relative to the root; one for each root and process.

    Raises:
        StoreError: obstore is not installed, or does not know such an address.
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
    with _naming("open", root):
        return from_url(str(root), **options)


def put(root: Url, key: str, data: bytes) -> None:
    """Write an object: with one request, or in parts, which appear together with the last one."""
    store = open_store(root)
    import obstore  # noqa: PLC0415

    with _naming("write", root / key):
        obstore.put(
            store,
            key,
            data,
            use_multipart=len(data) > PART_BYTES,
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_AT_ONCE,
        )


def get(root: Url, key: str) -> bytes | None:
    """Read an object, or None if it does not exist; a large one in parts."""
    store = open_store(root)
    import obstore  # noqa: PLC0415
    from obstore.exceptions import PreconditionError  # noqa: PLC0415

    with _naming("read", root / key):
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


def written(root: Url, key: str) -> float:
    """Time at which an object was written, by the store's clock, in seconds since 1970."""
    store = open_store(root)
    import obstore  # noqa: PLC0415

    with _naming("read", root / key):
        try:
            return float(obstore.head(store, key)["last_modified"].timestamp())
        except FileNotFoundError:
            raise StoreError(f"{root / key} is gone right after it was written") from None


def names(root: Url, key: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the objects directly under a key, sorted."""
    store = open_store(root)
    import obstore  # noqa: PLC0415

    with _naming("list", root / key):
        found = obstore.list_with_delimiter(store, key)
    return (
        sorted(prefix.rsplit("/", 1)[-1] for prefix in found["common_prefixes"]),
        sorted(meta["path"].rsplit("/", 1)[-1] for meta in found["objects"]),
    )


def listing(root: Url, key: str) -> dict[str, tuple[int, float]]:
    """Every object under a key: its size, and when it was written."""
    store = open_store(root)
    import obstore  # noqa: PLC0415

    with _naming("list", root / key):
        return {
            meta["path"]: (int(meta["size"]), meta["last_modified"].timestamp())
            for page in obstore.list(store, key)
            for meta in page
        }


def remove(root: Url, keys: Sequence[str]) -> None:
    """Remove objects, 1,000 per request where the store can do that."""
    store = open_store(root)
    import obstore  # noqa: PLC0415

    if not keys:
        return
    with _naming("remove", root / keys[0]):
        try:
            obstore.delete(store, list(keys))
        except FileNotFoundError:  # of a store without bulk requests, which stops there
            for key in keys:
                with suppress(FileNotFoundError):
                    obstore.delete(store, key)


def is_refusal(error: BaseException) -> bool:
    """Whether an error comes from the object store rather than from what was read of it."""
    return type(error).__module__.startswith("obstore")


@contextmanager
def _naming(verb: str, where: Url) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            raise
        reason = str(error).split("\n\nDebug source:")[0].strip()[:600]
        raise StoreError(f"cannot {verb} {where}: {reason}; {_advice(str(error))}") from error


def _advice(error: str) -> str:
    """Explain a refusal; the text of an error names its cause where its type does not."""
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
