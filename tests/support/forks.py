"""Runs many commands, some to be killed, for the price of importing the package once.

A server process imports the package, then forks for each command. A command may be told to kill
itself with SIGKILL at its n-th durable file operation (fsync, rename), before or after it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.cli import ENVIRONMENT


class Forks:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self, *arguments: object, kill_at: int | None = None, after: bool = False
    ) -> tuple[int, int]:
        """Run a command; return its exit code (-9 when killed) and its durable operations."""
        request = {
            "arguments": [str(argument) for argument in arguments],
            "kill_at": kill_at,
            "after": after,
        }
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["operations"]


@contextmanager
def forks(stage: str) -> Iterator[Forks]:
    """Start a server that has imported a stage."""
    process = subprocess.Popen(
        [sys.executable, __file__, stage],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        yield Forks(process)
    finally:
        process.communicate(timeout=60)


def _count_and_kill(kill_at, after, counter):
    for name in ("fsync", "rename", "replace"):
        original = getattr(os, name)

        def counted(*arguments, original=original, **keywords):
            counter[0] += 1
            due = kill_at is not None and counter[0] == kill_at
            if due and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **keywords)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, counted)


def _child(request, report: int) -> None:
    from wanlora.cli import app

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    counter = [0]
    _count_and_kill(request["kill_at"], request["after"], counter)
    code = 0
    try:
        app(request["arguments"])
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  (whatever it was, the parent waits for an answer)
        code = 99
    os.write(report, str(counter[0]).encode())
    os._exit(code)


def _serve(stage: str) -> None:
    import importlib

    importlib.import_module(stage)
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _child(json.loads(line), write)
        os.close(write)
        _, status = os.waitpid(child, 0)
        operations = os.read(read, 100)
        os.close(read)
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "operations": int(operations or b"0"),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
