"""Ctrl-C and SIGTERM: finish the step, save, and stop; a second Ctrl-C stops at once.

Owns: the signal handlers, while training runs.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class StopRequest:
    """Which signal has asked this process to stop, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Note the first request; obey a second one at once."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        logger.warning("%s: saving after this step, then stopping", self.signal.name)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block; only the main thread can."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {
        number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
