"""A local copy of the rows of a remote store, filled as they are read.

Owns: one file per row, `<folder>/rows/<fp>/<first two digits>/<key>.<array>`: the row as .npy. Only
rows whose checksum matched are written, and the reader checks them again, so a kill or a damaged
file costs one more request. It may be deleted at any time.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float

from wanlora.store.folder import Folder

FLAG = "--local-copy"
"""Option that names the folder."""


class LocalCopy:
    """Rows of one kind and encoder in a folder.

    Args:
        folder: Folder of the copy; made when the first row is written.
        generation: Key of the group that holds the rows in the store.
    """

    def __init__(self, folder: Path, generation: str) -> None:
        self._folder = Folder(folder, FLAG)
        self._generation = generation.rpartition("/")[2]

    def read(self, key: str, name: str) -> Float[np.ndarray, "..."] | None:
        """Read a row without checking it; None if it is missing or is not an array.

        Raises:
            StoreError: The disk refuses.
        """
        data = self._folder.get(self._key(key, name))
        if data is None:
            return None
        try:
            row: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        except Exception:  # noqa: BLE001  (damaged bytes raise many kinds; they are fetched again)
            return None
        return row

    def write(self, key: str, name: str, row: Float[np.ndarray, "..."]) -> None:
        """Write a row whose checksum matched.

        Raises:
            StoreError: The disk is full or read-only; names --local-copy.
        """
        buffer = io.BytesIO()
        np.save(buffer, row, allow_pickle=False)
        self._folder.put(self._key(key, name), buffer.getvalue())

    @contextmanager
    def locked(self, key: str, name: str) -> Iterator[None]:
        """Hold an exclusive lock on a row, so that only one process of this machine fetches it.

        Raises:
            StoreError: The disk is full or read-only; names --local-copy.
        """
        with self._folder.locked(self._key(key, name)):
            yield

    def _key(self, key: str, name: str) -> str:
        return f"rows/{self._generation}/{key[:2]}/{key}.{name}"
