"""Several ranks of stage one at once, some of which die: forked, for the price of one import.

    python -m tests.support.ranks FOLDER   reads FOLDER/ranks.json, writes FOLDER/rank-N.json

Each rank has the variables that torchrun sets, and runs the stage as the command does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.cli import ENVIRONMENT


@dataclass(frozen=True)
class Fate:
    """What befalls a rank: it starts or is killed once so many segments are committed."""

    rank: int
    joins_at: int = 0
    killed_at: int | None = None


def run_ranks(folder: Path, settings: dict, world: int, fates: list[Fate]) -> dict[int, dict]:
    """Run ranks of a world; the results of those that lived, by rank."""
    request = {"settings": settings, "world": world, "fates": [asdict(fate) for fate in fates]}
    (folder / "ranks.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.ranks", str(folder)],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = sorted(folder.glob("rank-*.json"))
    return {int(name.stem.removeprefix("rank-")): json.loads(name.read_text()) for name in names}


def records(cache: Path, kind: str = "latents") -> list[Path]:
    """Commit records of a kind."""
    depth = {"latents": "*/*/*", "text": "*/*"}[kind]
    return list(cache.glob(f"store.zarr/{kind}/{depth}/zarr.json"))


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001  (whatever it was, no test goes on in the child)
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def _wait_for(segments: int, cache: Path) -> None:
    deadline = time.monotonic() + 200
    while segments and len(records(cache)) < segments:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _serve(folder: Path) -> None:
    import wanlora.commands.cache_latents.cache_latents  # noqa: F401  (before the forks)
    from wanlora.commands import cache_latents
    from wanlora.config import CacheLatentsConfig

    request = json.loads((folder / "ranks.json").read_text())
    config = CacheLatentsConfig(**request["settings"])

    def encode(rank: int) -> None:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        os.environ.update(zip(names, map(str, (rank, rank, request["world"])), strict=True))
        result = cache_latents.run(config)
        (folder / f"rank-{rank}.json").write_text(json.dumps(asdict(result)))

    fates = [Fate(**fate) for fate in request["fates"]]
    pids = {}
    for fate in sorted(fates, key=lambda fate: fate.joins_at):
        _wait_for(fate.joins_at, config.cache)
        pids[fate.rank] = _fork(lambda rank=fate.rank: encode(rank))
    for fate in fates:
        if fate.killed_at is not None:
            _wait_for(fate.killed_at, config.cache)
            os.kill(pids[fate.rank], signal.SIGKILL)
    for fate in fates:
        _, status = os.waitpid(pids[fate.rank], 0)
        expected = 0 if fate.killed_at is None else -signal.SIGKILL
        assert os.waitstatus_to_exitcode(status) == expected, (fate, status)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
