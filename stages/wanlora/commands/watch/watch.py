"""`wanlora watch`: serve the runs of a folder until a signal.

Owns: the port, the pages' data, and the end. Must not know: HTTP headers, markup.
"""

import errno
import logging
import os
import signal
import threading
import time
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path

from wanlora.commands.watch.list_page import figure
from wanlora.commands.watch.pages import Pages
from wanlora.commands.watch.run_files import Folder
from wanlora.commands.watch.server import Server
from wanlora.commands.watch.summary import Summary
from wanlora.config import WatchConfig
from wanlora.core.units import duration
from wanlora.errors import OutputError, RunError
from wanlora.processes.signals import stop_on_signals
from wanlora.report.text_table import text_table

DEFAULT_PORT = 8642
NUM_PORTS = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchResult:
    """The runs of a folder.

    Attributes:
        folder: The folder.
        runs: Its runs, the last written first.
        stopped: Name of the signal that ended the server; None with `once`.
    """

    folder: str
    runs: list[Summary] = field(default_factory=list)
    stopped: str | None = None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number."""
        return 128 + signal.Signals[self.stopped] if self.stopped else 0

    def lines(self) -> list[str]:
        """Format the list of runs; after a signal, one line."""
        if self.stopped:
            return [f"stopped: {self.stopped}"]
        if not self.runs:
            return [f"no runs in {self.folder}"]
        head = ["run", "state", "steps", "left", "loss", "held-out", "change", "written"]
        return text_table(head, [_cells(run) for run in self.runs])[1:]


def run(config: WatchConfig) -> WatchResult:
    """List the runs of a folder once, or serve their pages until a signal.

    Raises:
        RunError: The folder does not exist or cannot be read.
        OutputError: The port cannot be used.
    """
    folder = Folder(_existing(config.folder))
    pages = Pages(config.folder, folder)
    if config.once:
        return WatchResult(str(config.folder), pages.summaries())
    with _open_server(config.port, pages) as server:
        logger.info("watching %s at %s (Ctrl-C ends it)", config.folder, server.url)
        if "SSH_CONNECTION" in os.environ:
            port = server.server_port
            logger.info("on your own machine: ssh -L %d:127.0.0.1:%d HOST", port, port)
        if config.open and not webbrowser.open(server.url):
            logger.warning("--open: there is no browser on this machine")
        return WatchResult(str(config.folder), stopped=_serve(server).name)


def _serve(server: Server) -> signal.Signals:
    """Serve until a signal, and return it."""
    stopped = threading.Event()
    with stop_on_signals(lambda _: stopped.set(), ends_process=True) as stop:
        thread = threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True)
        thread.start()
        while not stopped.wait(3600):
            pass
        server.shutdown()
        thread.join()
    assert stop.signal
    return stop.signal


def _existing(folder: Path) -> Path:
    """Return the folder.

    Raises:
        RunError: It is not a folder that this user can read.
    """
    if not folder.exists():
        raise RunError(
            f"there is no folder {folder}; a run makes one: "
            f"wanlora train --cache cache/ --output-dir {folder}/NAME"
        )
    if not folder.is_dir():
        raise RunError(f"{folder} is a file; expected a folder with runs, such as outputs/")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise RunError(f"{folder} cannot be read by this user; change its permissions")
    return folder


def _open_server(port: int | None, pages: Pages) -> Server:
    """Open a port: the one given, or the first free one from `DEFAULT_PORT`.

    Raises:
        OutputError: The port is in use, or all that were tried are.
    """
    tried = range(DEFAULT_PORT, DEFAULT_PORT + NUM_PORTS) if port is None else (port,)
    for each in tried:
        try:
            return Server(each, pages.routes)
        except OSError as error:
            reason = error.strerror
            if error.errno != errno.EADDRINUSE:
                break
    named = str(port) if port is not None else f"{tried[0]} to {tried[-1]}"
    raise OutputError(
        f"cannot open port {named} on 127.0.0.1: {reason}; choose another with --port, or any free "
        "one with --port 0"
    )


def _cells(run: Summary) -> list[str]:
    planned = "" if run.steps_planned is None else f"/{run.steps_planned}"
    change = ""
    if run.best:
        change = f"{run.best.change_pct:+.1f} %"
        if run.best.ci95_pct:
            low, high = run.best.ci95_pct
            change += f" ({low:+.1f} to {high:+.1f})"
    return [
        run.name if run.name.isprintable() else ascii(run.name),
        run.state,
        f"{run.steps_done}{planned}",
        "" if run.eta_s is None else duration(round(run.eta_s)),
        figure(run.loss if run.loss_smoothed is None else run.loss_smoothed),
        figure(run.best.loss if run.best else None),
        change,
        f"{duration(max(0, round(time.time() - run.written_at)))} ago",
    ]
