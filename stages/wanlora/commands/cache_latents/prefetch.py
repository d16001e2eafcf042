"""Threads beside the encoder: some decode ahead of it, and one writes behind it.

Owns: the threads, their queues, and the time that the encoder had to wait. Threads are enough: PyAV
and torch decode and resize without the GIL (docs/benchmarks.md).
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

MAX_WAITING = 2
"""Maximum number of clips that wait to be written. Latents are small (8 MB), their frames large."""


class Prefetcher(Generic[In, Out]):
    """Results of work on items, in order, made in threads ahead of the consumer.

    Threads start at once, so the first results are made before the consumer is ready.

    Attributes:
        waited_s: Seconds that the consumer has waited for results.

    Args:
        work: Makes a result from an item; runs in a thread.
        items: Items, in the order of the results.
        threads: Number of threads.
        depth: Maximum number of results and items in work; bounds the memory.
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
            # Only now: with the result that the consumer holds, there are `depth` in all.
            yield item, result
            del result, future
            self._start_one()

    def close(self) -> None:
        """Stop; running work is finished, and its result dropped."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)


class WriteBehind:
    """One thread that does work in order while the caller continues; at most `MAX_WAITING` wait.

    Leaving the context waits for all work. An error in the thread is raised by the next call.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._waiting: deque[Future[None]] = deque()

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Queue some work.

        Raises:
            WanloraError: An error of earlier work.
        """
        while len(self._waiting) >= MAX_WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work, *arguments))

    def __enter__(self) -> "WriteBehind":  # noqa: PYI034  (beartype refuses Self here)
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


def prefetch_depth(item_bytes: int, *, threads: int, max_bytes: int) -> int:
    """Number of decoded clips that may wait: two per thread if memory allows, at least one."""
    return max(1, min(2 * threads, max_bytes // max(1, item_bytes)))
