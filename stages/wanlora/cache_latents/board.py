"""Which actor makes what: chunks to take, who holds them, and what comes back from the dead.

Owns: the list of chunks of a run on Ray. Plain Python, asked by one caller at a time; Ray makes an
actor of it. Knows rows by their keys alone.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from wanlora.store.schema import Kind

Chunk = Mapping[str, Any]
"""Rows to make, by key: clips, or prompts."""


class State(NamedTuple):
    """How far a run is.

    Attributes:
        done: Rows that workers have told of.
        waiting: Chunks that nobody has taken.
        holders: Workers that have taken any and have not come to their end.
    """

    done: int
    waiting: int
    holders: AbstractSet[int]


class Board:
    """Hands out chunks.

    Args:
        chunks: Of each kind, in the order they are taken.
    """

    def __init__(self, chunks: Mapping[Kind, Sequence[Chunk]]) -> None:
        self._waiting = {kind: list(reversed(those)) for kind, those in chunks.items()}
        self._held: dict[int, list[tuple[Kind, Chunk]]] = {}
        self._told: Counter[int] = Counter()
        self._done = 0

    def take(self, worker: int, kind: Kind) -> Chunk | None:
        """Give a worker its next chunk; None when none of this kind is waiting."""
        if not self._waiting[kind]:
            return None
        chunk = self._waiting[kind].pop()
        self._held.setdefault(worker, []).append((kind, chunk))
        return chunk

    def tell(self, worker: int, rows: int) -> None:
        """Count rows that are done."""
        self._told[worker] += rows
        self._done += rows

    def ended(self, worker: int) -> tuple[list[tuple[Kind, Chunk]], int]:
        """Forget a worker: the chunks it has taken, in order, and how many of their rows it did."""
        return self._held.pop(worker, []), self._told.pop(worker, 0)

    def put_back(self, chunks: Iterable[tuple[Kind, Chunk]]) -> None:
        """Let others take these, before anything else."""
        for kind, chunk in reversed(list(chunks)):
            self._waiting[kind].append(chunk)

    def state(self) -> State:
        """How far the run is."""
        waiting = sum(len(chunks) for chunks in self._waiting.values())
        return State(self._done, waiting, frozenset(self._held))
