"""Encode and decode the Zarr arrays of a segment.

Owns: dtypes, chunks, shards and codecs; with reader.py the only code that calls zarr. Every codec
is a core Zarr v3 codec, so that tensorstore and zarrs read the same bytes.
Legend: N = rows of the segment; the rest as in schema.
"""

from collections.abc import Mapping
from typing import Any

import numcodecs
import numpy as np
import zarr
from google_crc32c import value as crc32c_of
from jaxtyping import Float, Shaped
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from wanlora.core.kinds import Kind
from wanlora.store import schema
from wanlora.store.storage import Storage

TOKEN_CHUNK = 64
"""Tokens per chunk of embeddings. Zarr omits all-zero chunks, so padding costs nothing."""


def crc32c(row: Shaped[np.ndarray, "..."]) -> int:
    """CRC-32C of a row's bytes, little-endian, C order."""
    return int(crc32c_of(row.astype(row.dtype.newbyteorder("<"), copy=False).tobytes()))


def open_array(storage: Storage, key: str) -> "zarr.Array[Any]":
    """Open an array for reading."""
    return zarr.open_array(storage.zarr_store(), path=key, mode="r", zarr_format=3)


def round_mantissa(row: Float[np.ndarray, "..."], bits: int) -> Float[np.ndarray, "..."]:
    """Round to nearest with fewer mantissa bits; the zeros that remain compress well.

    This happens before storing, because most Zarr clients do not support a codec that rounds.
    """
    codec = numcodecs.BitRound(keepbits=bits)
    rounded: np.ndarray = codec.decode(codec.encode(row)).reshape(row.shape)
    return rounded


def build(
    kind: Kind, rows: list[Shaped[np.ndarray, "..."]], commit: Mapping[str, Any]
) -> list[tuple[str, bytes]]:
    """Encode a segment in memory.

    Args:
        kind: Kind of the rows.
        rows: Latents `[C, F, H, W]` each, or prompt_embeds `[L, D]` each, in the stored dtype.
        commit: Attributes of the commit record. The function adds `sizes`, the bytes of each other
            object.

    Returns:
        Names and bytes in the order to write them: shards, arrays, commit record.
    """
    objects: dict[str, Any] = {}
    store = MemoryStore(objects)
    layout = schema.KINDS[kind]
    names = layout.dimensions
    if layout.max_length is None:
        _write(store, layout.array, np.stack(rows), names, chunk=rows[0].shape, fill=np.nan)
    else:
        padded = np.zeros((len(rows), *layout.shape(rows[0].shape)), rows[0].dtype)
        for slot, row in zip(padded, rows, strict=True):
            slot[: len(row)] = row
        chunk = (TOKEN_CHUNK, *padded.shape[2:])
        _write(store, layout.array, padded, names, chunk=chunk, fill=0)
        lengths = np.array([len(row) for row in rows], np.uint16)
        _write(store, schema.LENGTHS, lengths, names[:1], chunk=(), fill=0)
    # zarr adds an empty group document above the arrays; ours is the commit record, written last.
    objects.pop(schema.GROUP, None)
    built = {name: buffer.to_bytes() for name, buffer in objects.items()}
    documents = {name for name in built if name.endswith(schema.GROUP)}
    ordered = [*sorted(built.keys() - documents), *sorted(documents)]
    sizes = {name: len(built[name]) for name in ordered}
    record = schema.commit_record({**commit, "sizes": sizes})
    return [*((name, built[name]) for name in ordered), (schema.GROUP, record)]


def _write(
    store: MemoryStore,
    name: str,
    values: Shaped[np.ndarray, "n ..."],
    dimensions: tuple[str, ...],
    *,
    chunk: tuple[int, ...],
    fill: float,
) -> None:
    array = zarr.create_array(
        store,
        name=name,
        shape=values.shape,
        chunks=(1, *chunk) if chunk else values.shape,
        shards=values.shape,
        dtype=values.dtype,
        fill_value=fill,
        serializer=BytesCodec(endian="little"),
        compressors=[
            BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=values.dtype.itemsize),
            Crc32cCodec(),
        ],
        dimension_names=dimensions,
        zarr_format=3,
    )
    array[...] = values
