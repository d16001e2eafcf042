"""Several processes of one run, as a launcher starts them, for the price of forks.

There is no launcher over them: when one is lost, the product itself stops the others, as between
nodes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support import cli, hooks
from tests.support.s3 import free_port
from tests.support.server import Forked


@dataclass(frozen=True)
class Ended:
    """Result of a process: its exit code (-9 when killed), its output, and its recorded calls."""

    code: int
    out: str
    text: str
    calls: Counter[str]


@dataclass(frozen=True)
class Launched:
    """Running processes of one run, in the order of their ranks."""

    processes: list[Forked]
    folder: Path

    def wait(self) -> list[Ended]:
        """Wait until all have ended."""
        return [
            Ended(
                process.wait(),
                (self.folder / f"{rank}.out").read_text(),
                " ".join((self.folder / f"{rank}.err").read_text().split()),
                Counter((self.folder / f"{rank}.calls").read_text().splitlines()),
            )
            for rank, process in enumerate(self.processes)
        ]


def start(
    folder: Path, commands: Sequence[Sequence[object]], *,
    victim: tuple[int, int, Path] | None = None, **environment: str,
) -> Launched:  # fmt: skip
    """Start a process for each command line; their output goes to a folder.

    `victim` is a rank, a signal and a path: that process sends itself the signal at its first
    collective after the path exists. Other processes get it wherever they are.
    """
    folder.mkdir(parents=True)
    shared = {
        "WORLD_SIZE": str(len(commands)), "LOCAL_WORLD_SIZE": str(len(commands)),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    processes = []
    for rank, words in enumerate(commands):
        end = victim[1:] if victim and victim[0] == rank else ()
        process = cli.start(
            *words,
            before=[partial(hooks.record_calls, folder / f"{rank}.calls", *end)],
            files=(folder / f"{rank}.out", folder / f"{rank}.err"),
            RANK=str(rank), LOCAL_RANK=str(rank), **shared | environment,
        )  # fmt: skip
        processes.append(process)
    return Launched(processes, folder)


def run(folder: Path, command: Sequence[object], *, count: int) -> list[Ended]:
    """Run one command line in `count` processes, all of which must succeed."""
    ended = start(folder, [command] * count).wait()
    assert [each.code for each in ended] == [0] * count, [each.text for each in ended]
    return ended
