"""Work that only one process of a machine does at a time: hashing, and loading UMT5.

Owns: the lock. It is in the machine's temporary folder, because the user's cache folder may be
shared by many machines, and the system releases it when its holder dies.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

TIMEOUT_S = 900.0
"""After this a process continues without its turn: the process that has it hangs."""

log = logging.getLogger(__name__)


@contextmanager
def turn(name: str) -> Iterator[None]:
    """Wait until no other process of this user on this machine has the turn of that name."""
    lock = FileLock(Path(tempfile.gettempdir()) / f"wanlora-{os.getuid()}-{name}.lock")
    try:
        lock.acquire(timeout=TIMEOUT_S)
    except (Timeout, OSError, NotImplementedError) as error:  # it only saves time or memory
        log.warning("not waiting for the turn to %s: %s", name, error)
    try:
        yield
    finally:
        lock.release()
