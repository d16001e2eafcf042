"""Writers that are killed with SIGKILL, one process each: run as a program of its own.

A process forks cleanly only while it has one thread, so this is not part of the test process.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from tests.support.stores import row_of, segment_writer
from wanlora.store import folder
from wanlora.store.schema import Kind

MODES = ("half-written", "before-rename", "after-rename")
NUM_PUTS: dict[Kind, int] = {"latents": 10, "text": 13}
"""4 or 3 groups above, then two segments of 3 or 5 objects."""

KEYS = [f"{i:064x}" for i in range(4)]


def kill_at(point: int, mode: str) -> None:
    """Make this process kill itself at the point-th object it publishes."""
    publish, calls = folder.publish, count()

    def watched(temporary: Path, target: Path) -> None:
        last = next(calls) == point
        if last and mode == "half-written":
            os.truncate(temporary, temporary.stat().st_size // 2)
        if last and mode != "after-rename":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(temporary, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    folder.publish = watched


def forked(work: Callable[[], None]) -> int:
    """Run work in a child process; its pid."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid


def write_two_segments(cache: Path, kind: Kind) -> None:
    with segment_writer(cache, kind, rows=2) as writer:
        for key in KEYS:
            writer.add(key, row_of(kind, key))


def write_forever(cache: Path, first: int) -> None:
    """Commit segments of 4 rows until killed; keys from `first` on."""
    with segment_writer(cache, "latents", rows=4) as writer:
        for i in count(first):
            writer.add(f"{i:064x}", row_of("latents", f"{i:064x}"))


def each_point(folder: Path) -> None:
    """Kill a writer at every step of publishing; one cache folder each."""
    for kind, num_puts in NUM_PUTS.items():
        for point in range(num_puts):
            for mode in MODES:
                cache = folder / f"{kind}-{point:02d}-{mode}"

                def work() -> None:
                    kill_at(point, mode)  # noqa: B023  (called before the loop goes on)
                    write_two_segments(cache, kind)  # noqa: B023

                _, status = os.waitpid(forked(work), 0)
                assert os.WIFSIGNALED(status), (kind, point, mode, "was never reached")


def at_random(cache: Path, rounds: int) -> None:
    """Kill two writers that overlap by half, at random moments."""
    rng = random.Random(0)
    for i in range(rounds):
        pids = [
            forked(lambda first=first: write_forever(cache, first)) for first in (8 * i, 8 * i + 4)
        ]
        for pid in pids:
            time.sleep(rng.uniform(0.05, 0.3))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    if sys.argv[1] == "each-point":
        each_point(Path(sys.argv[2]))
    else:
        at_random(Path(sys.argv[2]), rounds=int(sys.argv[3]))
