"""Several processes of one run, as a launcher starts them, for the price of one import.

A server process imports stage two, then forks the processes of each run. There is no launcher over
them: whatever stops the others when one is lost is the product's own doing, as between nodes.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.cli import ENVIRONMENT
from tests.support.s3 import free_port


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-9 when killed), and what it wrote."""

    code: int
    out: str
    text: str
    calls: Counter[str]


class Launched:
    """Processes of one run, on their way."""

    def __init__(self, server: "Server", folder: Path, pids: Sequence[int]) -> None:
        self._server = server
        self._folder = folder
        self.pids = pids

    def wait(self) -> list[Ended]:
        codes = self._server.ask({"wait": True})["codes"]
        return [
            Ended(
                code,
                (self._folder / f"{rank}.out").read_text(),
                " ".join((self._folder / f"{rank}.err").read_text().split()),
                Counter((self._folder / f"{rank}.calls").read_text().splitlines()),
            )
            for rank, code in enumerate(codes)
        ]


class Server:
    """A process that has imported stage two."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, request: Mapping[str, object]) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        folder: Path,
        commands: Sequence[Sequence[object]],
        *,
        victim: tuple[int, int, Path] | None = None,
        **environment,
    ) -> Launched:
        """Start a process for each command line; their output goes to a folder.

        `victim` is a rank, a signal and a path: that process sends itself the signal at its first
        collective after the path exists. A signal from the test could come too late.
        """
        folder.mkdir(parents=True)
        request = {
            "commands": [[str(word) for word in command] for command in commands],
            "folder": str(folder),
            "environment": environment | {"MASTER_PORT": str(free_port())},
            "victim": victim and [*victim[:2], str(victim[2])],
        }
        return Launched(self, folder, self.ask(request)["pids"])

    def run(self, folder: Path, command: Sequence[object], *, count: int) -> list[Ended]:
        """Run one command line in so many processes, all of which must succeed."""
        ended = self.start(folder, [command] * count).wait()
        assert [each.code for each in ended] == [0] * count, [each.text for each in ended]
        return ended


@contextmanager
def server() -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    try:
        yield Server(process)
    finally:
        process.communicate(timeout=60)


def _child(rank: int, request) -> None:
    from wanlora.cli import app

    folder, count = Path(request["folder"]), len(request["commands"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    local = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= local | world | request["environment"]
    victim = request["victim"]
    _write_down_calls(
        folder / f"{rank}.calls", victim[1:] if victim and victim[0] == rank else None
    )
    code = 0
    try:
        app(request["commands"][rank])
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  (whatever it was, the parent waits for an answer)
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _write_down_calls(path: Path, end: tuple[int, str] | None) -> None:
    """Append a line for each collective, with its size, and for each row fetched.

    What runs is the product: the functions are wrapped, not replaced. `end` is a signal that the
    process sends itself, and the path after which it does.
    """
    import torch.distributed as dist

    from wanlora.store.row_reader import RowReader

    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def wrap(owner, name, describe):
        original = getattr(owner, name)

        def wrapped(*arguments, **keywords):
            if end and Path(end[1]).exists():
                os.kill(os.getpid(), end[0])
            os.write(file, f"{describe(*arguments)}\n".encode())
            return original(*arguments, **keywords)

        setattr(owner, name, wrapped)

    wrap(dist, "all_reduce", lambda tensor: f"all_reduce {tensor.numel()}")
    wrap(dist, "all_gather", lambda _, tensor: f"all_gather {tensor.numel()}")
    wrap(dist, "monitored_barrier", lambda _: "meet")
    wrap(RowReader, "_read_far", lambda _, key: f"fetch {key}")


def _serve() -> None:
    import wanlora.commands.train.loop
    import wanlora.commands.train.opening  # noqa: F401

    pids: list[int] = []
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            print(json.dumps({"codes": codes}), flush=True)
            continue
        pids = []
        for rank in range(len(request["commands"])):
            pid = os.fork()
            if pid == 0:
                _child(rank, request)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)


if __name__ == "__main__":
    _serve()
