"""The first signal requests a stop; only SIGINT after SIGINT stops at once."""

import signal
from signal import SIGINT, SIGTERM

import pytest

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
