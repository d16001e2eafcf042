"""SIGTERM as Ctrl-C, so that a scheduler's stop publishes what is encoded."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


@contextmanager
def stopped_cleanly() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM too, and say that nothing was lost.

    Only the first one counts: a scheduler signals a group, and then its processes one another, and
    a second one would interrupt the publishing.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may catch signals
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        log.warning("stopped; what was encoded is kept, and the same command goes on from there")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
