"""Child processes for the price of a fork: a server has imported what they need.

    python -m tests.support.server MODULE...   reads requests on stdin, answers on stdout

A forked process is a real one: its own working directory, environment, files, signals and exit
code. Only the imports are shared, so a test of imports or of start-up starts Python itself
(`cli.modules_after`, `cli.command`). The server has one thread, so it can fork at any time.

Must not import the package before a request: a server without modules shows what a command imports.
"""

import gc
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.support import hooks

Work = Callable[[], object]
"""A function of a module with its arguments (`functools.partial`), or `command`, or `script`."""


class Forked:
    """A forked process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, server: "Server", pid: int) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline, pause = time.monotonic() + timeout, 0.001
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(pause)
            pause = min(0.05, 1.5 * pause)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Server:
    """A running server."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._one_request = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.server", *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def ask(self, request: Mapping[str, object]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        with self._one_request:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)

    def start(
        self, work: Work, *, before: Sequence[Work] = (), cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        files: Sequence[str | Path] = (os.devnull, os.devnull), terminal: str | None = None,
    ) -> Forked:  # fmt: skip
        """Start a process.

        Args:
            work: What the process does.
            before: Run first, in the same process; see `hooks`.
            cwd: Working directory; this process's by default.
            environment: The server's by default.
            files: Get what the process writes to stdout and stderr.
            terminal: Device that the process reads and writes instead, in a session of its own.
        """
        request = {
            "work": pickle.dumps([*before, work]),
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(self.environment if environment is None else environment),
            "files": [str(file) for file in files],
            "terminal": terminal,
        }
        return Forked(self, self.ask(request))

    def run(
        self, work: Work, *, before: Sequence[Work] = (), cwd: Path | None = None,
        environment: Mapping[str, str] | None = None, timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a process to its end, as `subprocess.run` with captured text."""
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/out", f"{folder}/err"]
            process = self.start(work, before=before, cwd=cwd, environment=environment, files=files)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            out, err = (Path(name).read_text(errors="backslashreplace") for name in files)
        return subprocess.CompletedProcess(str(work), code, out, err)

    def imported(self, arguments: Sequence[object], cwd: Path) -> tuple[int, str, set[str]]:
        """Run a command; return its exit code, its stderr and the names of imported modules."""
        with tempfile.NamedTemporaryFile("r") as names:
            listing = partial(hooks.list_modules, names.name)
            done = self.run(command(*arguments), before=[listing], cwd=cwd)
            return done.returncode, done.stderr, set(names.read().split())

    def close(self) -> None:
        self._process.communicate(timeout=60)


def command(*arguments: object) -> Work:
    """A command line of the package."""
    return partial(_command, [str(argument) for argument in arguments])


def _command(arguments: list[str]) -> None:
    import importlib.util

    from wanlora.cli import main

    # Processes that this one spawns import the module that it says it runs.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("wanlora.__main__")
    sys.argv = ["wanlora", *arguments]
    main()


def script(text: str, *arguments: object) -> Work:
    """A program's text and its arguments, as `python -c` runs it."""
    return partial(_script, text, [str(argument) for argument in arguments])


def _script(text: str, arguments: list[str]) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(text, "<script>", "exec"), {"__name__": "__main__"})


def _child(request: Mapping[str, Any], terminal: int | None) -> None:
    steps = pickle.loads(request["work"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.path[0] = request["cwd"]  # as `python -m` has it
    _redirect(request["files"], terminal)
    code = 0
    try:
        for step in steps:
            step()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:  # noqa: BLE001  (as Python ends with any other)
        import traceback

        traceback.print_exc()
        code = 1
    _leave(code)


def _redirect(files: Sequence[str], terminal: int | None) -> None:
    if terminal is not None:
        os.setsid()
        opened = [terminal] * 3
    else:
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        opened = [os.open(os.devnull, os.O_RDONLY), *(os.open(name, append) for name in files)]
    for number, file in enumerate(opened):
        os.dup2(file, number)
    # As at start-up: the streams remember whether the server's files can be sought.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def _leave(code: int) -> None:
    """End as an interpreter does: threads, exit handlers, streams."""
    import atexit

    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _poll(pid: int, codes: dict[int, int]) -> int | None:
    if pid not in codes:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes.get(pid)


def _fork(request: Mapping[str, Any]) -> int:
    # Open before the fork: a terminal that no process has open ends.
    name = request["terminal"]
    terminal = os.open(name, os.O_RDWR | os.O_NOCTTY) if name else None
    pid = os.fork()
    if pid == 0:
        _child(request, terminal)
    if terminal is not None:
        os.close(terminal)
    return pid


def _serve(modules: Sequence[str]) -> None:
    import importlib

    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # no collection in a child then touches, and so copies, the server's memory
    codes: dict[int, int] = {}
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer = _poll(request["poll"], codes) if "poll" in request else _fork(request)
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(sys.argv[1:])
