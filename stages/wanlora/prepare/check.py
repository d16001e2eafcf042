"""Check every source file once, in parallel, so that no file can stop the run.

Owns: the work of one process (hash and full decode of a file) and surviving its death.
Imports no torch: these processes must start quickly.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from wanlora.core.buckets import Bucket
from wanlora.errors import MediaError
from wanlora.media import npz, probe
from wanlora.media.source import source_sha256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Checked:
    """A source file that decodes from end to end.

    Attributes:
        content: What the video is like, or the size of an .npz clip.
    """

    sha256: str
    content: probe.Scan | Bucket


def check(path: Path) -> Checked | MediaError:
    """Hash a file and decode all of it; a problem is returned, not raised."""
    try:
        content = npz.read_checked(path) if path.suffix.lower() == ".npz" else probe.scan(path)
        return Checked(source_sha256(path), content)
    except MediaError as error:
        return error


def check_all(
    paths: Sequence[Path], *, workers: int
) -> Iterator[tuple[Path, Checked | MediaError]]:
    """Yield the outcome for every path, as they become ready.

    Args:
        paths: Files.
        workers: Processes; 1 = this one, 0 = one a core.
    """
    return survive(check, paths, workers=workers)


def survive(
    work: Callable[[Path], T], paths: Sequence[Path], *, workers: int
) -> Iterator[tuple[Path, T | MediaError]]:
    """Map in processes; a file that kills its process is an error of that file alone.

    When a process dies, nobody knows which file it held. Every file then under way is tried again,
    alone, and the one that kills its process again is the culprit.
    """
    if workers == 1:
        yield from ((path, work(path)) for path in paths)
        return
    count = min(workers or num_cores(), max(1, len(paths)))
    waiting = list(reversed(paths))
    while waiting:
        suspects: list[Path] = []
        with _pool(count) as pool:
            running: dict[Future[T], Path] = {}
            while waiting or running:
                while waiting and len(running) < count and not suspects:
                    path = waiting.pop()
                    try:
                        running[pool.submit(work, path)] = path
                    except BrokenProcessPool:
                        suspects.append(path)
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    path = running.pop(future)
                    try:
                        yield path, future.result()
                    except BrokenProcessPool:
                        suspects.append(path)
        for path in suspects:
            yield path, _alone(work, path)


def num_cores() -> int:
    """Cores this process may use, which is fewer than the machine's in many containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _alone(work: Callable[[Path], T], path: Path) -> T | MediaError:
    with _pool(1) as pool:
        try:
            return pool.submit(work, path).result()
        except BrokenProcessPool:
            return MediaError("unreadable", f"{path}: decoding it killed the process that did it")


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
