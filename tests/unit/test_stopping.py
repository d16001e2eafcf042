"""The first signal requests a stop; only SIGINT after SIGINT stops at once."""

import io
import logging
import signal
import threading
from signal import SIGINT, SIGTERM

import pytest

from wanlora.commands.train import loop
from wanlora.processes.signals import interrupted_by_signals, stop_on_signals


@pytest.mark.parametrize(
    ("received", "stops_at_once"),
    [
        ([SIGINT], False),
        ([SIGTERM], False),
        ([SIGTERM, SIGTERM, SIGTERM], False),
        ([SIGTERM, SIGINT], False),
        ([SIGINT, SIGTERM, SIGTERM], False),
        ([SIGINT, SIGINT], True),
        ([SIGINT, SIGTERM, SIGINT], True),
        ([SIGTERM, SIGINT, SIGINT], True),
    ],
)
def test_only_a_second_sigint_stops_at_once(received, stops_at_once):
    before = [signal.getsignal(number) for number in (SIGINT, SIGTERM)]
    noted, interrupted = [], False
    with stop_on_signals(noted.append) as stop:
        assert stop.signal is None
        try:
            for number in received:
                assert not interrupted
                signal.raise_signal(number)
        except KeyboardInterrupt:
            interrupted = True
    assert (interrupted, stop.signal, noted) == (stops_at_once, received[0], received[:1])
    assert [signal.getsignal(number) for number in (SIGINT, SIGTERM)] == before


@pytest.mark.parametrize("first", [SIGINT, SIGTERM])
def test_a_later_sigterm_does_not_interrupt_what_the_first_signal_made_publish(first):
    published = []

    def work() -> None:
        with interrupted_by_signals():
            try:
                signal.raise_signal(first)
            finally:
                signal.raise_signal(SIGTERM)
                published.append("a segment")

    with pytest.raises(KeyboardInterrupt) as interrupt:
        work()
    assert published
    assert interrupt.value.args == (first,)


def test_a_signal_that_is_not_listed_keeps_its_handler():
    before = signal.getsignal(SIGINT)
    with interrupted_by_signals([SIGTERM]):
        assert signal.getsignal(SIGINT) is before


@pytest.mark.parametrize(
    ("received", "ignored"), [([], False), ([SIGTERM], True), ([SIGINT], True)]
)
def test_a_stop_that_ends_the_process_ignores_a_later_sigterm(received, ignored):
    before = [signal.getsignal(number) for number in (SIGINT, SIGTERM)]
    try:
        with stop_on_signals(lambda _: None, ends_process=True):
            for number in received:
                signal.raise_signal(number)
        after = [signal.getsignal(number) for number in (SIGINT, SIGTERM)]
        assert after == [before[0], signal.SIG_IGN if ignored else before[1]]
    finally:
        signal.signal(SIGTERM, before[1])


class InterruptedTerminal(io.RawIOBase):
    """A terminal at which Ctrl-C is pressed while it is first written to."""

    def __init__(self) -> None:
        self.shown = b""

    def writable(self) -> bool:
        return True

    def write(self, data: memoryview) -> int:
        first, self.shown = not self.shown, self.shown + bytes(data)
        if first:
            signal.raise_signal(SIGINT)
        return len(data)


def test_a_signal_during_a_write_to_the_log_stops_training_with_a_message(monkeypatch):
    raw = InterruptedTerminal()
    stream = io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=True)
    monkeypatch.setattr(loop.logger, "handlers", [logging.StreamHandler(stream)])
    before = set(threading.enumerate())
    with stop_on_signals(loop._log_stop) as stop:
        stream.write("a progress bar\n")
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
    assert stop.signal == SIGINT
    assert raw.shown.startswith(b"a progress bar\nSIGINT: ")
