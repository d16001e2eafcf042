"""Map a function over files in processes, each of which may crash or hang without harm.

Owns: the processes, the file that each works on, and how long it may take. Imports no torch: these
processes must start quickly. Must not know: what is done with a file.
"""

import multiprocessing
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

T = TypeVar("T")
Alive = Callable[[], None]
"""Function that work calls between two steps, to show that it has not hung."""

HEARTBEAT_S = 0.5
PAUSE_S = 5.0
"""After a longer time between two looks, this process was stopped (Ctrl-Z, a paused container)."""
_ALIVE = "alive"


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    path: Path | None = None
    heard_s: float = 0.0


def map_in_processes(
    work: Callable[[Path, Alive], T], paths: Sequence[Path], *, workers: int, stall_s: float
) -> Iterator[tuple[Path, T | MediaError]]:
    """Map over files as they become ready; a file that kills or hangs its process fails alone.

    Args:
        work: Function of a file; it calls its second argument while it makes progress.
        paths: Files.
        workers: Number of processes; 0 = one per core. 1 = this process, which is not protected.
        stall_s: Seconds without progress after which a process is killed.
    """
    if workers == 1:
        yield from ((path, work(path, _nothing)) for path in paths)
        return
    waiting = list(reversed(paths))
    pool = [_start(work) for _ in range(min(workers or num_cores(), len(paths)))]
    try:
        for worker in pool:
            _give(worker, waiting)
        looked_s = time.monotonic()
        while any(worker.path for worker in pool):
            if (paused_s := time.monotonic() - looked_s) > PAUSE_S:
                for worker in pool:  # they were stopped too, and have not hung
                    worker.heard_s += paused_s
            looked_s = time.monotonic()
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
    """Cores this process may use, which is fewer than the machine's in many containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcome(worker: _Worker, stall_s: float) -> Any:
    """Return the result of a worker's file; None while it works, or without a file."""
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


def _start(work: Callable[[Path, Alive], T]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker, waiting: list[Path]) -> None:
    if waiting:
        worker.path, worker.heard_s = waiting.pop(), time.monotonic()
        with suppress(OSError):  # it died while idle: the next poll reports it
            worker.pipe.send(worker.path)


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _serve(pipe: Connection, work: Callable[[Path, Alive], T]) -> None:
    """Body of a process: files in, outcomes out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    with suppress(EOFError, OSError):
        while True:
            path = pipe.recv()
            pipe.send(work(path, _heart(pipe)))


def _heart(pipe: Connection) -> Alive:
    last_s = time.monotonic()

    def beat() -> None:
        nonlocal last_s
        if time.monotonic() - last_s > HEARTBEAT_S:
            last_s = time.monotonic()
            pipe.send(_ALIVE)

    return beat


def _nothing() -> None:
    pass
