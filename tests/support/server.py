"""Processes of the command line for the price of a fork: a server has imported what they need.

    python -m tests.support.server MODULE...   reads requests on stdin, answers on stdout

A forked process is a real one: its own working directory, environment, files, signals and exit
code. Only the imports are shared, so a test of imports or of start-up starts Python itself
(`cli.modules_after`, `cli.command`).

Must not import the package before a request: a server without modules shows what a command imports.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Forked:
    """A forked process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, server: "Server", pid: int) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})["code"]
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
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.server", *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, arguments: Sequence[object], *, cwd: Path | None, environment: Mapping[str, str],
        files: Sequence[str] = (os.devnull, os.devnull), modules_file: str | None = None,
    ) -> Forked:  # fmt: skip
        """Start a command; `files` take its stdout and stderr."""
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(environment),
            "files": list(files),
            "modules_file": modules_file,
        }
        return Forked(self, self.ask(request)["pid"])

    def run(
        self, arguments: Sequence[object], *, cwd: Path | None, environment: Mapping[str, str],
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command, as `subprocess.run` with captured text."""
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/out", f"{folder}/err"]
            process = self.start(arguments, cwd=cwd, environment=environment, files=files)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            out, err = (Path(name).read_text(errors="backslashreplace") for name in files)
        return subprocess.CompletedProcess(list(map(str, arguments)), code, out, err)

    def imported(self, arguments: Sequence[object], cwd: Path) -> tuple[int, str, set[str]]:
        """Run a command; return its exit code, its stderr and the names of imported modules."""
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/out", f"{folder}/err"]
            process = self.start(
                arguments, cwd=cwd, environment=self.environment, files=files,
                modules_file=f"{folder}/modules",
            )  # fmt: skip
            code = process.wait()
            modules = set(Path(f"{folder}/modules").read_text().split())
            return code, Path(files[1]).read_text(), modules

    def close(self) -> None:
        self._process.communicate(timeout=60)


def _child(request: Mapping[str, Any]) -> None:
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.path[0] = request["cwd"]  # as `python -m` has it
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in enumerate(request["files"], 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    import importlib.util

    from wanlora.cli import main

    # Processes that this one spawns import the module that it says it runs.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("wanlora.__main__")
    sys.argv = ["wanlora", *request["arguments"]]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:  # noqa: BLE001  (as Python ends with any other)
        import traceback

        traceback.print_exc()
        code = 1
    if request["modules_file"]:
        Path(request["modules_file"]).write_text("\n".join(sys.modules))
    _leave(code)


def _leave(code: int) -> None:
    """End as an interpreter does: threads, exit handlers, streams."""
    import atexit
    import threading

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


def _serve(modules: Sequence[str]) -> None:
    import importlib

    for module in modules:
        importlib.import_module(module)
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = {"code": _poll(request["poll"], codes)}
        else:
            pid = os.fork()
            if pid == 0:
                _child(request)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
