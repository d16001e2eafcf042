"""SIGINT and SIGTERM: the first one requests a stop, and only a second Ctrl-C stops at once.

Owns: the signal handlers of every command that saves its work before it stops.
Must not know: that work.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """The signal that requested a stop, if one came.

    Args:
        on_first: Called with the first signal, in the main thread.
    """

    def __init__(self, on_first: Callable[[signal.Signals], None]) -> None:
        self.signal: signal.Signals | None = None
        self._on_first = on_first
        self._num_interrupts = 0

    def number(self) -> int:
        """Number of the signal that requested a stop, or 0."""
        return int(self.signal or 0)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Note the first signal; ignore later ones, except a second SIGINT.

        A scheduler or launcher signals a group and then its processes, so SIGTERM often comes more
        than once. Only a person sends SIGINT twice.

        Raises:
            KeyboardInterrupt: On the second SIGINT, or from `on_first`.
        """
        received = signal.Signals(number)
        self._num_interrupts += received == signal.SIGINT
        if self.signal is None:
            self.signal = received
            self._on_first(received)
        elif received == signal.SIGINT and self._num_interrupts > 1:
            raise KeyboardInterrupt(received)


@contextmanager
def stop_on_signals(
    on_first: Callable[[signal.Signals], None],
    signals: Sequence[signal.Signals] = SIGNALS,
    *,
    ends_process: bool = False,
) -> Iterator[StopRequest]:
    """Catch signals inside the block. Python can do this only in the main thread.

    Args:
        on_first: Called with the first signal.
        signals: Signals to catch.
        ends_process: After a stop, the process only reports and exits: SIGTERM stays ignored after
            the block, because launchers send it more than once and a later one would kill the
            process and replace its exit code.
    """
    request = StopRequest(on_first)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            stays_ignored = ends_process and request.signal and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if stays_ignored else handler)


@contextmanager
def interrupted_by_signals(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Raise KeyboardInterrupt on the first signal, for work that is kept when it is interrupted.

    Raises:
        KeyboardInterrupt: With the signal as its argument.
    """

    def interrupt(received: signal.Signals) -> None:
        raise KeyboardInterrupt(received)

    with stop_on_signals(interrupt, signals):
        yield
