"""Stage one in several processes, some of which are killed: the cache is that of one process."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support import cli
from tests.support.server import Forked, script
from tests.support.stores import segments_of
from wanlora.commands import cache_latents
from wanlora.commands.cache_latents import local_workers
from wanlora.core.location import parse
from wanlora.store import bucket
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, read_view

CLIPS, ROWS = 24, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Clips of two sizes, and one that is damaged behind its header."""
    folder = tmp_path_factory.mktemp("workers") / "data"
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(CLIPS + 1):
        frames = rng.integers(0, 256, (5, 16, 32 if i % 3 else 16, 3), dtype=np.uint8)
        np.savez(folder / f"clip-{i:02d}.npz", frames=frames)
        lines.append({"npz": f"clip-{i:02d}.npz", "prompt": f"caption {i % 7}"})
    damaged = bytearray((folder / f"clip-{CLIPS}.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (folder / f"clip-{CLIPS}.npz").write_bytes(damaged)
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments(data: Path, cache: object, *more: object) -> list[str]:
    return [
        "cache-latents", "--manifest", str(data), "--cache", str(cache), "--model", "micro",
        "--device", "cpu", "--set", f"store.clips_per_segment={ROWS}", "--json", *map(str, more),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(data, micro_home) -> tuple[View, StoreReader]:
    """What one process makes of it."""
    result = cli.invoke(*arguments(data, data.parent / "alone"))
    assert result.exit_code == 3, result.output
    summary = json.loads(result.stdout)
    assert (summary["clips"], summary["workers"], summary["clips_encoded_twice"]) == (CLIPS, 1, 0)
    view = read_view(data.parent / "alone", "default")
    return view, StoreReader.of_view(data.parent / "alone", view)


def repeated(cache: object, fingerprint: str) -> int:
    rows = [key for s in segments_of(cache, "latents", fingerprint) for key in s.row_keys]
    return len(rows) - len(set(rows))


def check_same(cache: object, alone: tuple[View, StoreReader]) -> None:
    """The view to the bit, and every row that it names."""
    view, wanted = alone
    assert read_view(cache, "default").sha256 == view.sha256
    reader = StoreReader.of_view(cache, view)
    for clip in view.clips:
        assert np.array_equal(reader.latents(clip.key), wanted.latents(clip.key))
    for key in view.prompt_keys():
        assert np.array_equal(reader.prompt_embeds(key), wanted.prompt_embeds(key))


def records(cache: Path) -> list[Path]:
    """Commit records of latents."""
    return list(cache.glob("store.zarr/latents/*/*/*/zarr.json"))


def wait_for_segments(cache: Path, number: int) -> None:
    deadline = time.monotonic() + 240
    while len(records(cache)) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


RANK = """
import json, sys
from dataclasses import asdict
from wanlora.commands import cache_latents
from wanlora.config import CacheLatentsConfig
result = cache_latents.run(CacheLatentsConfig(**json.loads(sys.argv[1])))
print(json.dumps(asdict(result)))
"""


def start_rank(data: Path, cache: object, folder: Path, rank: int, world: int) -> Forked:
    """Start a rank with the variables that torchrun sets; its result goes to `rank-N.json`."""
    settings = {
        "manifest": [str(data)], "cache": str(cache), "model": "micro", "device": "cpu",
        "store": {"clips_per_segment": ROWS},
    }  # fmt: skip
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    return cli.server().start(
        script(RANK, json.dumps(settings)), environment=os.environ | cli.ENVIRONMENT | own,
        files=(folder / f"rank-{rank}.json", folder / f"rank-{rank}.log"),
    )  # fmt: skip


def results(folder: Path, ranks: list[tuple[int, Forked]]) -> list[dict]:
    """Wait for ranks that must finish, and read their results."""
    for number, rank in ranks:
        assert rank.wait() == 0, (folder / f"rank-{number}.log").read_text()
    return [json.loads((folder / f"rank-{number}.json").read_text()) for number, _ in ranks]


def test_ranks_that_join_late_or_are_killed_leave_the_cache_of_one_process(data, alone, tmp_path):
    cache = tmp_path / "cache"
    first, killed = (start_rank(data, cache, tmp_path, rank, 3) for rank in (0, 1))
    wait_for_segments(cache, 2)
    late = start_rank(data, cache, tmp_path, 2, 3)
    wait_for_segments(cache, 4)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    finished = results(tmp_path, [(0, first), (2, late)])
    check_same(cache, alone)
    for result in finished:
        assert [failure["code"] for failure in result["failures"]] == ["bad_npz"]
        assert (result["clips"], result["workers"]) == (CLIPS, 3)
        # Whoever encoded them, and whenever.
        assert result["clips_encoded"] + result["clips_cached"] == CLIPS
    # The rank that ended last has seen them all.
    counted = max(result["clips_encoded_twice"] for result in finished)
    assert counted == repeated(cache, alone[0].fingerprint("latents"))


@pytest.mark.filterwarnings("ignore:.*ObjectStore.*:UserWarning")
def test_ranks_share_an_object_store(data, alone, tmp_path, s3):
    bucket.open_store.cache_clear()
    ranks = [(rank, start_rank(data, s3, tmp_path, rank, 2)) for rank in (0, 1)]
    found = results(tmp_path, ranks)
    assert {result["view_sha256"] for result in found} == {alone[0].sha256}
    check_same(parse(s3), alone)


def test_a_killed_process_leaves_its_work_to_the_others(data, alone, tmp_path, caplog):
    cache = tmp_path / "cache"
    killer = threading.Thread(target=kill_a_worker, args=(cache, os.getpid()))
    killer.start()
    result = cli.invoke(*arguments(data, cache, "--num-workers", 2))
    killer.join()
    assert result.exit_code == 3, result.output
    assert "(SIGKILL)" in caplog.text
    check_done(json.loads(result.stdout), cache, alone)


def test_a_killed_actor_is_replaced(data, alone, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    cache = tmp_path / "cache"
    files = (tmp_path / "result.json", tmp_path / "log")
    words = arguments(data, cache, "--launcher", "ray", "--num-workers", 2)
    run = cli.start(*words, files=files)
    kill_a_worker(cache, run.pid)
    assert run.wait() == 3, files[1].read_text()
    assert re.search(r"died; .*again", files[1].read_text())
    check_done(json.loads(files[0].read_text()), cache, alone)


def check_done(result: dict, cache: Path, alone: tuple[View, StoreReader]) -> None:
    check_same(cache, alone)
    assert (result["clips"], result["clips_encoded"], result["workers"]) == (CLIPS, CLIPS, 2)
    assert [failure["code"] for failure in result["failures"]] == ["bad_npz"]
    assert result["clips_encoded_twice"] == repeated(cache, alone[0].fingerprint("latents"))


def kill_a_worker(cache: Path, parent: int) -> None:
    """Send SIGKILL to whoever committed the first clips, once there are a few."""
    wait_for_segments(cache, 2)
    writer = json.loads(records(cache)[0].read_text())["attributes"]["wanlora"]["writer"]
    assert writer["pid"] != parent
    os.kill(int(writer["pid"]), signal.SIGKILL)


def test_a_rank_whose_machine_lacks_a_video_publishes_no_smaller_view(data, tmp_path, monkeypatch):
    lines = (data / "train.jsonl").read_text()
    for clip in data.glob("*.npz"):
        if clip.stem != "clip-03":
            (tmp_path / clip.name).symlink_to(clip)
    (tmp_path / "train.jsonl").write_text(lines)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    message = cli.refuses(*arguments(tmp_path, tmp_path / "cache"))
    assert "process 1 of 2" in message
    assert "lacks 1 clips' videos" in message
    assert "clip-03.npz" in message
    assert not (tmp_path / "cache" / "views").exists()


def test_variables_that_no_launcher_sets_are_named(data, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "x")
    message = cli.refuses(*arguments(data, tmp_path / "cache"), exit_code=2)
    assert "WORLD_SIZE=x" in message


def test_a_rank_starts_no_workers_of_its_own(data, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for more in (("--num-workers", 2), ("--launcher", "ray")):
        message = cli.refuses(*arguments(data, tmp_path / "cache", *more), exit_code=2)
        assert "rank 0 of 2" in message
        assert "leave out --launcher and --num-workers" in message


def test_a_cluster_that_does_not_answer_is_named(data, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    message = cli.refuses(*arguments(data, tmp_path, "--launcher", "ray"))
    assert "RAY_ADDRESS=127.0.0.1:9" in message
    assert "ray start --head" in message


def test_ray_that_is_not_installed_is_named_with_what_installs_it(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "wanlora.commands.cache_latents.on_ray", raising=False)
    monkeypatch.delattr(cache_latents, "on_ray", raising=False)
    message = cli.refuses(*arguments(data, tmp_path, "--launcher", "ray"), exit_code=2)
    assert "pip install 'wanlora[ray]'" in message


def stop_a_worker(cache: Path) -> None:
    """Send SIGSTOP to the worker that committed the first clips."""
    wait_for_segments(cache, 1)
    writer = json.loads(records(cache)[0].read_text())["attributes"]["wanlora"]["writer"]
    os.kill(int(writer["pid"]), signal.SIGSTOP)


def in_a_thread(*steps) -> threading.Thread:
    thread = threading.Thread(target=lambda: [step() for step in steps])
    thread.start()
    return thread


def test_a_frozen_worker_is_named_and_killed_and_the_others_finish(
    data, alone, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(local_workers, "SILENT_S", 8.0)
    cache = tmp_path / "cache"
    stopper = in_a_thread(lambda: stop_a_worker(cache))
    result = cli.invoke(*arguments(data, cache, "--num-workers", 2))
    stopper.join()
    assert result.exit_code == 3, result.output
    assert re.search(r"worker [01] .*heartbeat .*\b8 s;", caplog.text)
    check_done(json.loads(result.stdout), cache, alone)


def test_ctrl_c_ends_within_seconds_although_a_worker_is_frozen(
    data, alone, tmp_path, caplog, monkeypatch
):
    cache, interrupted_s = tmp_path / "cache", []

    def interrupt() -> None:
        interrupted_s.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    stopper = in_a_thread(lambda: stop_a_worker(cache), interrupt)
    result = cli.invoke(*arguments(data, cache, "--num-workers", 2))
    stopper.join()
    assert time.monotonic() - interrupted_s[0] < 40
    assert result.exit_code == 130, result.output
    assert "did not stop" in caplog.text


class Worker:
    """Stands for a worker whose process is not looked at."""

    def __init__(self, *, num_rows: int | None, heard_s: float, advanced_s: float) -> None:
        now = time.monotonic()
        self.num_rows, self.heard_s, self.advanced_s = num_rows, now - heard_s, now - advanced_s


@pytest.mark.parametrize(
    ("num_rows", "heard_s", "advanced_s", "finished_s", "reason"),
    [
        (3, 1, 100, None, None),
        (None, 900, 900, None, None),  # still starting
        (3, 61, 61, None, "no heartbeat"),
        (3, 1, 1801, None, "worker_timeout_s"),
        (None, 1801, 1801, None, "worker_timeout_s"),
        (3, 1, 100, 30, None),
        (3, 1, 100, 61, "every row is made"),
    ],
)
def test_a_worker_is_given_up_for_one_of_three_reasons(
    num_rows, heard_s, advanced_s, finished_s, reason
):
    worker = Worker(num_rows=num_rows, heard_s=heard_s, advanced_s=advanced_s)
    finished = None if finished_s is None else time.monotonic() - finished_s
    found = local_workers._hangs(worker, 1800.0, finished)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("looked_s", "reason"), [(100, None), (1, "no heartbeat")])
def test_a_worker_that_was_stopped_together_with_its_parent_is_not_given_up(looked_s, reason):
    """Ctrl-Z stops all of them; the parent may look before the workers beat again."""
    worker = Worker(num_rows=3, heard_s=101, advanced_s=1850)
    local_workers._take_off_pause([worker], time.monotonic() - looked_s)
    found = local_workers._hangs(worker, 1800.0, None)
    assert found is None if reason is None else reason in found
