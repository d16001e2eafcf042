"""A lock for work that one process per machine does at a time: hashing, and loading UMT5.

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
"""Maximum seconds to wait for a turn; after that, the process that has it is assumed to hang."""

log = logging.getLogger(__name__)


@contextmanager
def turn(name: str) -> Iterator[None]:
    """Wait for the turn of a name among the processes of this user on this machine."""
    lock = FileLock(Path(tempfile.gettempdir()) / f"wanlora-{os.getuid()}-{name}.lock")
    try:
        lock.acquire(timeout=TIMEOUT_S)
    except (Timeout, OSError, NotImplementedError) as error:  # it only saves time or memory
        log.warning("not waiting for the turn to %s: %s", name, error)
    try:
        yield
    finally:
        lock.release()
