"""The process of a stage: it is started, receives signals, and its exit code is awaited.

Owns: one command of this package in its own process. Must not know: which command.
"""

import signal
import subprocess
import sys
from contextlib import suppress

from wanlora.processes.signals import stop_on_signals


def run_command(words: list[str], *, captured: bool) -> tuple[int, str]:
    """Run a command of this package; return its exit code and its output if it is captured.

    A terminal sends Ctrl-C to the command as well, which then stops in its own way. SIGTERM is
    passed on.

    Raises:
        KeyboardInterrupt: This process received a signal meanwhile.
    """
    command: subprocess.Popen[str] | None = None

    def pass_on(received: signal.Signals) -> None:
        if command is not None and received == signal.SIGTERM:
            command.send_signal(received)

    text = None
    with stop_on_signals(pass_on) as stop:
        command = subprocess.Popen(  # noqa: S603  (our own command)
            [sys.executable, "-m", "wanlora", *words],
            stdout=subprocess.PIPE if captured else _stdout(), text=True,
        )  # fmt: skip
        if stop.signal is not None:  # it came while the command was started
            pass_on(stop.signal)
        while text is None:
            with suppress(KeyboardInterrupt):  # a second Ctrl-C, which the command received too
                text = command.communicate()[0] or ""
    if stop.signal is not None:
        raise KeyboardInterrupt(stop.signal)
    return command.returncode if command.returncode >= 0 else 128 - command.returncode, text


def _stdout() -> int | None:
    """Return the descriptor of this program's results; its descriptor 1 is for other output."""
    try:
        return sys.stdout.fileno()
    except OSError:  # replaced by a stream without one
        return None
