"""What runs beside the encoder: threads that decode ahead of it, and one that writes behind it.

    decode threads -> bounded queue, pinned -> encoder (the caller) -> write thread -> segments

Owns: the threads, their queues, and the measure of how long the encoder had to wait. Threads are
enough: PyAV and torch decode and resize without the GIL (docs/benchmarks.md).
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

from wanlora.core.out_of_memory import explained_out_of_memory

In = TypeVar("In")
Out = TypeVar("Out")

BEHIND = 2
"""Clips that may wait to be written: they are small (8 MB), the frames they carry are not."""


class Ahead(Generic[In, Out]):
    """Results of work on items, in order, made in threads ahead of the consumer.

    Threads start at once, so the first results are made while the consumer still gets ready.

    Attributes:
        waited_s: How long the consumer has waited for results.

    Args:
        work: What to do with an item; runs in a thread.
        items: In the order the results are wanted.
        threads: How many.
        depth: Most results (and work under way) at a time: bounds memory, whatever len(items) is.
        initializer: Called first in each thread.
    """

    def __init__(
        self,
        work: Callable[[In], Out],
        items: Iterable[In],
        *,
        threads: int,
        depth: int,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        self.waited_s = 0.0
        self._work = work
        self._todo = iter(items)
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="decode", initializer=initializer
        )
        self._ahead: deque[tuple[In, Future[Out]]] = deque()
        for _ in range(depth):
            self._start_one()

    def _start_one(self) -> None:
        for item in self._todo:
            self._ahead.append((item, self._pool.submit(self._work, item)))
            return

    def __iter__(self) -> Generator[tuple[In, Out], None, None]:
        while self._ahead:
            item, future = self._ahead.popleft()
            started = time.monotonic()
            result = future.result()
            self.waited_s += time.monotonic() - started
            # Only now: what is ahead and what the consumer holds stay `depth` in all.
            yield item, result
            del result, future
            self._start_one()

    def close(self) -> None:
        """Stop; work under way is finished, and its result dropped."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)


class Behind:
    """One thread that does things in order behind the caller, at most `BEHIND` of them waiting.

    Leaving the context waits for all of it. An error in the thread is raised by the next call.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._waiting: deque[Future[None]] = deque()

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Queue some work.

        Raises:
            WanloraError: What earlier work raised.
        """
        while len(self._waiting) >= BEHIND or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work, *arguments))

    def __enter__(self) -> "Behind":  # noqa: PYI034  (beartype refuses Self here)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        if error is None:
            for future in self._waiting:
                future.result()


def depth(largest: int, *, threads: int, max_bytes: int) -> int:
    """How many decoded clips of so many bytes may wait: two a thread, if memory allows, but one."""
    return max(1, min(2 * threads, max_bytes // max(1, largest)))


def explaining_memory(what: str, *advice: str) -> AbstractContextManager[None]:
    """Replace out-of-memory errors inside the block by a refusal that names what to change.

    Args:
        what: The work, as in "loading the VAE".
        advice: Options that save memory.

    Raises:
        DeviceError: The device or the machine has too little memory.
    """
    options = "; ".join(advice)
    return explained_out_of_memory(
        lambda reason: f"out of memory {what} ({reason}). Encoded rows are kept. Options: {options}"
    )
