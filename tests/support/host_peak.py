"""Peak of this process's own memory in a block of code, without pages of files: Linux only."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
AVAILABLE = _STATUS.exists()


@dataclass
class Measured:
    """Bytes above those at the start."""

    peak: int = 0


def anonymous_bytes() -> int:
    [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@contextmanager
def measured() -> Iterator[Measured]:
    """Sample the memory every 2 ms until the block ends."""
    result, before, stop = Measured(), anonymous_bytes(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            result.peak = max(result.peak, anonymous_bytes() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield result
    finally:
        stop.set()
        watching.join()
