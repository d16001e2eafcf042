"""SIGTERM as Ctrl-C."""

import os
import signal

import pytest

from wanlora.cache_latents.stopping import stopped_cleanly


def work(published: list[str]) -> None:
    with stopped_cleanly():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            published.append("a segment")


def test_a_second_sigterm_does_not_interrupt_what_the_first_one_made_publish():
    published: list[str] = []
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        work(published)
    assert published
    assert signal.getsignal(signal.SIGTERM) is handler
