"""A pool of processes for work on files: one that crashes or hangs does not stop the others.

Owns: the processes, the file that each one works on, and the time that it may be silent. Imports no
torch: these processes must start quickly.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from wanlora.errors import LostProcessError, MediaError
from wanlora.processes.children import pause_since, start_child

T = TypeVar("T")
Heartbeat = Callable[[], None]
"""Work calls it between two steps, to show that it has not hung."""

HEARTBEAT_S = 0.5
_ALIVE = "alive"


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    path: Path | None = None
    heard_s: float = 0.0


def map_in_processes(
    work: Callable[[Path, Heartbeat], T], paths: Sequence[Path], *, workers: int, stall_s: float
) -> Iterator[tuple[Path, T | MediaError]]:
    """Yield a result per file, as they become ready; a file that kills its process fails alone.

    Args:
        work: Makes a result from a file.
        paths: Files.
        workers: Number of processes; 0 is one per core. 1 is this process, which is not protected.
        stall_s: A process without a heartbeat for this many seconds is killed.
    """
    if workers == 1:
        yield from ((path, work(path, _nothing)) for path in paths)
        return
    waiting = list(reversed(paths))
    pool: list[_Worker] = []
    try:
        for _ in range(min(workers or num_cores(), len(paths))):
            pool.append(_start(work))
            _give(pool[-1], waiting)
        looked_s = time.monotonic()
        while any(worker.path for worker in pool):
            paused_s, looked_s = pause_since(looked_s), time.monotonic()
            for worker in pool:
                worker.heard_s += paused_s
            for index, worker in enumerate(pool):
                path, outcome = worker.path, _outcome(worker, stall_s)
                if path is None or outcome is None:
                    continue
                worker.path = None
                if isinstance(outcome, LostProcessError):
                    _stop(worker)
                    pool[index] = _start(work)
                _give(pool[index], waiting)
                yield path, outcome
            wait([worker.pipe for worker in pool if worker.path], timeout=HEARTBEAT_S)
    finally:
        for worker in pool:
            _stop(worker)


def num_cores() -> int:
    """Return the cores that this process may use: in many containers fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcome(worker: _Worker, stall_s: float) -> Any:
    """Result of a worker for its file; None while it works, or if it has no file."""
    if worker.path is None:
        return None
    try:
        while worker.pipe.poll():
            message = worker.pipe.recv()
            worker.heard_s = time.monotonic()
            if message != _ALIVE:
                return message
    except (EOFError, OSError):
        return LostProcessError(
            "unreadable", f"{worker.path}: decoding it killed the process that did it"
        )
    if time.monotonic() - worker.heard_s > stall_s:
        return LostProcessError(
            "unreadable", f"{worker.path}: decoding it has hung for {stall_s:g} s"
        )
    return None


def _start(work: Callable[[Path, Heartbeat], T]) -> _Worker:
    return _Worker(*start_child(_serve, work))


def _give(worker: _Worker, waiting: list[Path]) -> None:
    if waiting:
        worker.path, worker.heard_s = waiting.pop(), time.monotonic()
        with suppress(OSError):  # it died while idle; the next check finds that
            worker.pipe.send(worker.path)


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _serve(pipe: Connection, work: Callable[[Path, Heartbeat], T]) -> None:
    """Body of a process: files in, outcomes out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    with suppress(EOFError, OSError):
        while True:
            path = pipe.recv()
            pipe.send(work(path, _heartbeat(pipe)))


def _heartbeat(pipe: Connection) -> Heartbeat:
    last_s = time.monotonic()

    def beat() -> None:
        nonlocal last_s
        if time.monotonic() - last_s > HEARTBEAT_S:
            last_s = time.monotonic()
            pipe.send(_ALIVE)

    return beat


def _nothing() -> None:
    pass
