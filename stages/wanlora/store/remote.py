"""Objects of a cache in an object store (S3, GCS, Azure, and whatever else obstore opens).

Owns: every call of obstore. One PUT makes an object appear whole, so there is nothing else to do.
Credentials and endpoint come from the environment (docs/cache.md). Requests that fail in a way
that may pass (5xx, a broken connection) are repeated by obstore. Must not be used across a fork.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from wanlora.core.location import Url
from wanlora.errors import StoreError

MAX_RETRIES = 6
"""Repeats of a request, with waits of 0.1 s growing to 5 s."""

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
        "retry_timeout": timedelta(minutes=3),
    }
    options: Any = {"client_options": {"allow_http": True}} if plain_http else {}
    if not str(root).startswith("memory:"):
        options["retry_config"] = retry
    with _naming("open", root):
        return from_url(str(root), **options)


def put(root: Url, key: str, data: bytes) -> None:
    """Write an object with one request."""
    import obstore  # noqa: PLC0415

    with _naming("write", root / key):
        # Never in parts: an upload in parts that is broken off leaves litter that nobody lists.
        obstore.put(open_store(root), key, data, use_multipart=False)


def get(root: Url, key: str) -> bytes | None:
    """Read an object, or None when there is none."""
    store = open_store(root)
    import obstore  # noqa: PLC0415

    with _naming("read", root / key):
        try:
            return bytes(obstore.get(store, key).bytes())
        except FileNotFoundError:
            return None


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
    """Remove objects; those that are not there are none."""
    store = open_store(root)
    import obstore  # noqa: PLC0415

    for key in keys:
        with _naming("remove", root / key):
            try:
                obstore.delete(store, key)
            except FileNotFoundError:
                continue


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
        reason = str(error).split("\n\nDebug source:")[0].strip()
        raise StoreError(
            f"cannot {verb} {where}: {reason[:600]}; check the address, the network and the "
            "credentials in the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_REGION, and AWS_ENDPOINT_URL for a server of your own)"
        ) from error
