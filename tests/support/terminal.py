"""A terminal of a given width: a pty, and an emulator that draws what was written to it."""

import fcntl
import os
import pty
import signal
import struct
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyte

from tests.support import cli
from tests.support.server import command

ROWS = 200
"""So many that nothing leaves the screen."""


@dataclass(frozen=True)
class Shown:
    """What a terminal received, and how its screen then looks."""

    raw: bytes
    lines: list[str]
    width: int
    code: int = 0

    def rows(self) -> list[str]:
        """Everything that was ever on a line, without the code that erases it."""
        return self.raw.decode().replace("\x1b[K", "").replace("\n", "\r").split("\r")


def size(terminal: int, width: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, width, 0, 0))


def screen(raw: bytes, width: int, code: int = 0) -> Shown:
    drawn = pyte.Screen(width, ROWS)
    pyte.ByteStream(drawn).feed(raw)
    lines = [line.rstrip() for line in drawn.display]
    while lines and not lines[-1]:
        lines.pop()
    return Shown(raw, lines, width, code)


class Terminal:
    """A pty whose output is collected; `stream` writes to it."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._ours, theirs = pty.openpty()
        size(theirs, width)
        self.stream = os.fdopen(theirs, "w", buffering=1)
        self._raw = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def resize(self, width: int) -> None:
        size(self.stream.fileno(), width)

    def shown(self) -> Shown:
        """Close it, and return what was shown."""
        self.stream.close()
        self._reader.join(10)
        os.close(self._ours)
        return screen(bytes(self._raw), self.width)

    def _read(self) -> None:
        try:
            while data := os.read(self._ours, 65536):
                self._raw += data
        except OSError:  # Linux: the other end is closed
            return


def run(
    *arguments: object, width: int, cwd: Path | None = None,
    until: Callable[[bytes], bool] = lambda _: False,
) -> Shown:  # fmt: skip
    """Run a command in a terminal; press Ctrl-C when `until` is true of its output."""
    ours, theirs = pty.openpty()
    size(theirs, width)
    environment = {**os.environ, **cli.ENVIRONMENT, "TERM": "xterm"}
    del environment["COLUMNS"]
    process = cli.server().start(
        command(*arguments), cwd=cwd, environment=environment, terminal=os.ttyname(theirs)
    )
    os.close(theirs)
    raw, pressed = bytearray(), False
    try:
        while data := os.read(ours, 65536):
            raw += data
            if not pressed and until(bytes(raw)):
                pressed = True
                os.killpg(process.pid, signal.SIGINT)
    except OSError:  # Linux: the other end is closed
        pass
    code = process.wait(60)
    os.close(ours)
    return screen(bytes(raw), width, code)
