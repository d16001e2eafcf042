"""One console for log lines and progress bars.

Owns: stderr while a command runs. On a terminal the newest open bar is the last line, and every
other line appears above it. Elsewhere a bar is a plain line every 30 s. Must not know: the work.
"""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_EVERY_S = 30.0
LEAST_BAR = 10
"""Minimum columns of the bar beside optional figures."""

_ON_TERMINAL = "{desc}: {n_fmt}/{total_fmt} |{bar}| {rate_fmt}, {remaining} left{postfix}"
_NO_BAR = _ON_TERMINAL.replace("|{bar}| ", "")
_IN_A_LOG = (
    "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f} %), {elapsed} elapsed, {remaining} left, "
    "{rate_fmt}{postfix}"
)

logger = logging.getLogger(__name__)

_bars: "list[tqdm[Any]]" = []
"""Bars open on the terminal; only the last one is drawn."""

_drawing = threading.RLock()
"""Held while a line or a bar is written, also by tqdm: lines may come from other threads."""


class _Console:
    """A text stream whose lines appear above the open bar."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._unfinished = ""

    def write(self, text: str) -> int:
        with _drawing:
            if not _bars:
                self.stream.write(text)
                return len(text)
            lines, newline, self._unfinished = (self._unfinished + text).rpartition("\n")
            if newline:
                _bars[-1].clear(nolock=True)
                self.stream.write(lines + newline)
                _bars[-1].refresh(nolock=True)
        return len(text)

    def release(self) -> None:
        """Write an unfinished line, now that no bar is open."""
        text, self._unfinished = self._unfinished, ""
        if text:
            self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Lines:
    """Turn tqdm's carriage returns into whole lines, for logs and pipes."""

    def __init__(self) -> None:
        self.written_at = time.monotonic()

    def write(self, text: str) -> int:
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(text + "\n")
            self.written_at = time.monotonic()
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def console() -> Iterator[None]:
    """Send everything that is printed to stderr, above the open bar.

    `sys.stdout` is included: it belongs to the result, which is printed afterwards.
    """
    stdout, stderr = sys.stdout, sys.stderr
    shared = _Console(stderr)
    sys.stdout = sys.stderr = cast("TextIO", shared)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        shared.release()


@contextmanager
def bar(
    *, total: int, description: str, unit: str, done: int = 0, shown: bool = True
) -> "Iterator[tqdm[Any]]":
    """Open a progress bar; move it with `.update(n)`, and add figures with `show_figures`.

    An inner bar hides the outer one while it is open.

    Args:
        total: Number of units.
        description: Name of the work, a word or two.
        unit: Name of one unit, for the rate.
        done: Units finished before this process started; they do not enter the rate.
        shown: False in processes that leave the display to another one.
    """
    from tqdm import tqdm  # noqa: PLC0415  (not needed for --help)

    stream = _terminal()
    options: dict[str, Any] = {
        "total": total, "initial": done, "desc": description, "unit": unit, "position": 0,
        "smoothing": 0.1, "disable": not shown,
    }  # fmt: skip
    if stream is None or not shown:
        lines = _Lines()
        with tqdm(
            file=lines, mininterval=LINE_EVERY_S, maxinterval=2 * LINE_EVERY_S,
            delay=LINE_EVERY_S, bar_format=_IN_A_LOG, ascii=True, **options,
        ) as opened, _repeated(opened, lines):  # fmt: skip
            yield opened
        return
    # The delay skips a first display, which would have another width.
    options |= {"file": stream, "leave": not _bars, "delay": 1e-9, "bar_format": _ON_TERMINAL}
    tqdm.set_lock(_drawing)
    with _outer_hidden():
        opened = tqdm(**options)
        vars(opened).update(dynamic_ncols=_room, sp=partial(_draw, stream), delay=0)
        with _drawing:
            opened.refresh(nolock=True)
            _bars.append(opened)
        try:
            yield opened
        finally:
            with _drawing:
                # By identity: tqdm's == compares positions.
                _bars[:] = [each for each in _bars if each is not opened]
                opened.close()


@contextmanager
def _repeated(opened: "tqdm[Any]", lines: _Lines) -> Iterator[None]:
    """Write the line of a bar again while one unit takes long; tqdm writes it after a unit only."""
    if opened.disable:
        yield
        return

    def refresh() -> None:
        if time.monotonic() - lines.written_at >= 2 * LINE_EVERY_S:
            opened.refresh()

    with _repeating(refresh, every_s=max(0.01, LINE_EVERY_S / 4)):
        yield


@contextmanager
def _repeating(work: Callable[[], None], *, every_s: float) -> Iterator[None]:
    """Call a function periodically in a thread, until the block ends."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every_s):
            work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _outer_hidden() -> Iterator[None]:
    """Hide the bar that is drawn, and draw it again afterwards."""
    outer = _bars[-1] if _bars else None
    if outer:
        outer.delay = math.inf  # updates are counted, and not drawn
        outer.clear()
    try:
        yield
    finally:
        if outer:
            outer.delay = 0
        if outer and any(each is outer for each in _bars):
            outer.refresh()
        if not _bars and isinstance(sys.stderr, _Console):
            sys.stderr.release()


def show_figures(opened: "tqdm[Any]", *figures: str) -> None:
    """Show figures beside a bar at its next update, as many as its line has room for.

    Args:
        opened: From `bar`.
        figures: The most important one first; it is shown even if no room is left for the bar.
    """
    if opened.disable or not figures:
        return
    if opened.bar_format == _IN_A_LOG:
        opened.postfix = ", ".join(figures)
        return
    facts = dict(opened.format_dict)
    width = facts["ncols"]
    facts |= {"ncols": None, "postfix": figures[0], "bar_format": _NO_BAR}
    room = width - len(opened.format_meter(**facts))
    opened.bar_format = _ON_TERMINAL if room > LEAST_BAR // 2 else _NO_BAR
    shown = [figures[0]]
    for figure in figures[1:]:
        room -= len(f", {figure}")
        if room < LEAST_BAR:
            break
        shown.append(figure)
    opened.postfix = ", ".join(shown)


def _terminal() -> TextIO | None:
    """Return the stream of stderr if it is a terminal that can rewrite a line."""
    stream = sys.stderr.stream if isinstance(sys.stderr, _Console) else sys.stderr
    return stream if stream.isatty() and os.environ.get("TERM") != "dumb" else None


def _room(stream: TextIO) -> tuple[int, int]:
    """Columns and rows for a bar; the last column stays free, or some terminals start a line."""
    columns, rows = os.get_terminal_size(stream.fileno())
    return (columns or 80) - 1, rows or 24


def _draw(stream: TextIO, line: str) -> None:
    """Replace the last line; the escape code erases to the line's end at any width."""
    room, _ = _room(stream)  # tqdm older than 4.70 does not cut a line without a bar
    stream.write(f"\r\x1b[K{line[:room]}")
    stream.flush()


@contextmanager
def waiting(what: str, *, shown: bool = True) -> Iterator[None]:
    """Log that a long call begins, and every 30 s that it still runs.

    Args:
        what: The work, for example "loading the VAE".
        shown: False in processes that leave the display to another one.
    """
    if not shown:
        yield
        return
    logger.info("%s", what)
    started = time.monotonic()

    def remind() -> None:
        logger.info("%s: %.0f s so far", what, time.monotonic() - started)

    with _repeating(remind, every_s=LINE_EVERY_S):
        yield
