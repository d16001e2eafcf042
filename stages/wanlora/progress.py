"""Progress: a bar with rate and ETA on a terminal, elsewhere a line every 30 s.

Owns: how long work is shown. Writes to stderr only; knows nothing of the work.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 30.0

logger = logging.getLogger(__name__)


class _Lines:
    """Turn tqdm's carriage returns into whole lines, for logs and pipes."""

    def write(self, text: str) -> int:
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(text + "\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def bar(
    *, total: int, description: str, unit: str, done: int = 0, shown: bool = True
) -> "tqdm[Any]":
    """Open a progress bar; use as a context manager and call `.update(n)` and `.set_postfix_str`.

    Args:
        total: How many units there are in all.
        description: What is being done, a word or two.
        unit: Name of one unit, for the rate.
        done: Units finished before this process started; they do not enter the rate.
        shown: Whether there is anything to see; of several processes one shows it.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.1 if terminal else LINE_EVERY_S,
        maxinterval=10.0 if terminal else 2 * LINE_EVERY_S,
        ascii=None if terminal else True,
        dynamic_ncols=terminal,
        smoothing=0.1,
        leave=True,
        disable=not shown,
    )


@contextmanager
def waiting(what: str, *, shown: bool = True) -> Iterator[None]:
    """Log that a long call begins, and every 30 s that it still runs.

    Args:
        what: The work, as in "loading the VAE".
        shown: Whether to log; of several processes one does.
    """
    if not shown:
        yield
        return
    logger.info("%s", what)
    over, started = threading.Event(), time.monotonic()

    def remind() -> None:
        while not over.wait(LINE_EVERY_S):
            logger.info("%s: %.0f s so far", what, time.monotonic() - started)

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
