"""Actors that take turns: every operation on an object waits until a schedule names its actor."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from wanlora.store.folder import Folder

OPERATIONS = (
    "put", "get", "get_many", "files", "folders", "listing", "sizes_in_folders", "remove",
    "remove_many", "remove_tree", "remove_trees",
)  # fmt: skip


class Turns:
    """Runs functions in threads, one operation at a time, in a given order.

    Args:
        actors: Functions by name.
        schedule: Indices of actors; afterwards they take turns until all have ended.
    """

    def __init__(self, actors: dict[str, Callable[[], None]], schedule: Sequence[int]) -> None:
        self._actors = list(actors.items())
        self._schedule = schedule
        self._go = [threading.Semaphore(0) for _ in actors]
        self._done = threading.Semaphore(0)
        self._ended = [False] * len(actors)
        self._mine = threading.local()
        self.errors: dict[str, BaseException] = {}

    def run(self) -> None:
        """Run all actors to their end."""
        threads = [
            threading.Thread(target=self._run_one, args=(i,)) for i in range(len(self._actors))
        ]
        with self._watched():
            for thread in threads:
                thread.start()
            for index in self._order():
                if not self._ended[index]:
                    self._go[index].release()
                    assert self._done.acquire(timeout=60), self._actors[index][0]
            for thread in threads:
                thread.join(timeout=60)

    def _order(self) -> Iterator[int]:
        yield from (index % len(self._actors) for index in self._schedule)
        while not all(self._ended):
            yield from range(len(self._actors))

    def _run_one(self, index: int) -> None:
        name, work = self._actors[index]
        self._mine.index = index
        self._go[index].acquire()
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            self.errors[name] = error
        self._ended[index] = True
        self._done.release()

    def _wait(self) -> None:
        index = getattr(self._mine, "index", None)
        if index is not None:  # not a thread of the store's own
            self._done.release()
            self._go[index].acquire()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        def watched(original: Callable) -> Callable:
            def operation(*arguments: object, **options: object) -> object:
                self._wait()
                return original(*arguments, **options)

            return operation

        with pytest.MonkeyPatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(Folder, name, watched(getattr(Folder, name)))
            yield
