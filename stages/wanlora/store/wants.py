"""Rows that must be kept: those in a view, and those that an unfinished run needs.

Owns: `CACHE/wants/<view>-<digest>.jsonl`, which `cache-latents` publishes before it looks for
missing rows. It is the view that the run will publish if every clip can be encoded, so ranks write
equal bytes, and it counts as a view for a collection until the view itself is published.
"""

import hashlib
import io
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from wanlora.core.fingerprint import SHORT
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import StoreError
from wanlora.store import schema, storage
from wanlora.store.views import FORMAT, View, document, kinds_in, view_names

SUFFIX = ".jsonl"

Named = Mapping[tuple[Kind, str], Shaped[np.ndarray, " n"]]
"""Keys to keep as sorted bytes, by kind and whole fingerprint."""


def publish(cache: Location, view: View) -> str:
    """Publish the rows that a run will need; return the name of the list.

    Args:
        cache: Cache folder or URL.
        view: View that the run will publish, with its name.

    Raises:
        StoreError: The disk is full, or the object store refuses.
    """
    data = document(view)
    name = f"{view.name}-{hashlib.sha256(data).hexdigest()[:SHORT]}"
    if name not in names(cache):
        storage.at(cache).put(key_of(name), data)
    return name


def names(cache: Location, view: str | None = None) -> list[str]:
    """Names of all lists, sorted; with `view`, only those of that view."""
    found = [
        name.removesuffix(SUFFIX)
        for name in storage.at(cache).files(schema.WANTS)
        if name.endswith(SUFFIX)
    ]
    return [name for name in found if view is None or view_of(name) == view]


def read(cache: Location, name: str) -> Named:
    """Read the keys of one list; empty if its run has published its view.

    Raises:
        StoreError: It is damaged.
        StoreVersionError: It has another version.
    """
    data = storage.at(cache).get(key_of(name))
    return {} if data is None else _rows_in(data, cache, key_of(name))


def drop(cache: Location, which: Collection[str]) -> None:
    """Remove lists; a name without a list is ignored.

    Raises:
        StoreError: The disk or the object store refuses.
    """
    storage.at(cache).remove_many([key_of(name) for name in which])


def key_of(name: str) -> str:
    """Key of the object of a list."""
    return f"{schema.WANTS}/{name}{SUFFIX}"


def view_of(name: str) -> str:
    """Name of the view that the run of a list will publish."""
    return name.rpartition("-")[0]


def named_rows(cache: Location, *, ignored: Collection[str] = ()) -> Named:
    """Read the keys in all views and in all lists except the ignored ones.

    Lists are read first: a run publishes its view before it removes its list, so one of them is
    found.

    Raises:
        StoreError: A view or a list is damaged.
        StoreVersionError: It has another version.
    """
    found: dict[tuple[Kind, str], list[Shaped[np.ndarray, " n"]]] = {}
    listed = [key_of(name) for name in names(cache) if name not in ignored]
    listed += [f"{schema.VIEWS}/{name}{SUFFIX}" for name in view_names(cache)]
    for key in listed:
        data = storage.at(cache).get(key)
        for where, keys in () if data is None else _rows_in(data, cache, key).items():
            found.setdefault(where, []).append(keys)
    return {where: np.unique(np.concatenate(parts)) for where, parts in found.items()}


def _rows_in(data: bytes, cache: Location, key: str) -> Named:
    """Keys that a view or a list names; only keys are kept, so a million clips take 130 MB."""
    try:
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="\n")
        header = json.loads(text.readline())
        schema.check_version(header, str(cache / key), name=FORMAT)
        more = [header["empty_prompt"], header["negative_prompt"]]
        more += [prompt["key"] for prompt in header["validation_prompts"]]
        clips: list[bytes] = []
        prompts = [prompt.encode() for prompt in more]
        for line in text:
            clip: dict[str, Any] = json.loads(line)
            clips.append(clip["key"].encode())
            prompts += [prompt.encode() for prompt in clip["prompts"]]
        columns = {True: _column(clips), False: _column(prompts)}
        return {
            (kind, str(header[kind])): columns[schema.KINDS[kind].per_clip]
            for kind in kinds_in(header)
        }
    except schema.DAMAGE as error:
        raise StoreError(
            f"{cache / key} is damaged ({type(error).__name__}: {error}), so the rows to keep are "
            f"not known; {_way_out(cache, key)}"
        ) from error


def _way_out(cache: Location, key: str) -> str:
    folder, _, file = key.partition("/")
    name = file.removesuffix(SUFFIX)
    if folder == schema.VIEWS:
        return f"make it again with: wanlora cache-latents --cache {cache} --view {name}"
    return (
        f"run wanlora cache-latents --cache {cache} --view {view_of(name)} again, or free the rows "
        f"of that run with: wanlora inspect {cache} --gc --set 'gc_drop_wants=[\"{name}\"]'"
    )


def _column(keys: list[bytes]) -> Shaped[np.ndarray, " n"]:
    return np.unique(np.array(keys, np.dtype("S")) if keys else np.zeros(0, np.dtype("S1")))
