"""The state and the numbers of a run, from its lock and its files."""

import os
import shutil
import socket
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.watched import lines, metrics_row, status, write_run
from wanlora.commands.watch.run_files import Folder
from wanlora.commands.watch.summary import Summaries, state_of
from wanlora.runs import run_folder

NOW = 1_000_000.0
RUN_OF_0_1_0 = Path(__file__).parents[1] / "fixtures" / "v0.1.0" / "run"


def state(found, **changed):
    facts = {
        "locked": False, "now": NOW, "written_at": NOW - 1, "seconds_per_step": 1.0,
        "is_complete": False, "is_saved": False,
    }  # fmt: skip
    return state_of(found, **facts | changed)[0]


def recorded(state="training", host=None, written_s_ago=1.0):
    values = status(state=state) | {"written_at": NOW - written_s_ago}
    return values | {"host": host or socket.gethostname()}


def test_a_run_that_holds_its_lock_is_running():
    assert state(recorded(written_s_ago=1e5), locked=True) == "running"
    assert state(recorded("stopped"), locked=True) == "running"  # continued a moment ago
    assert state(None, locked=True) == "running"


@pytest.mark.parametrize(
    ("known", "shown"), [("done", "finished"), ("stopped", "stopped"), ("failed", "failed")]
)
def test_a_recorded_end_counts(known, shown):
    assert state(recorded(known)) == shown


def test_a_run_of_this_machine_whose_lock_is_free_was_killed():
    assert state(recorded(written_s_ago=0.1)) == "no sign of life"


@pytest.mark.parametrize(("host", "locked"), [("another-machine", False), (None, None)])
def test_a_run_whose_lock_says_nothing_is_running_while_it_writes(host, locked):
    assert state(recorded(host=host, written_s_ago=140), locked=locked) == "running"
    assert state(recorded(host=host, written_s_ago=160), locked=locked) == "no sign of life"


def test_a_run_of_an_older_release_is_judged_by_its_files():
    assert state(None, is_complete=True) == "finished"
    assert state(None, is_saved=True) == "stopped"
    assert state(None) == "no sign of life"
    silent = {"locked": None, "written_at": NOW - 700}
    assert state(None, **silent) == "no sign of life"
    assert state(None, **silent, seconds_per_step=60.0) == "running"


def summaries(folder):
    found = Folder(folder)
    return Summaries(found).of(found.find_runs().runs)


def test_a_run_in_one_line(tmp_path):
    run = write_run(
        tmp_path / "a", num_steps=8, planned=20, losses=(0.45, 0.42), rank=32, rate=2e-4,
        status_values={"state": "training"},
    )  # fmt: skip
    with FileLock(run / ".lock"):
        [found] = summaries(tmp_path)
    assert (found.name, found.state, found.reason) == ("a", "running", None)
    assert (found.steps_done, found.steps_planned, found.rank) == (8, 20, 32)
    assert (found.learning_rate, found.best.step, found.best.loss) == (2e-4, 8, 0.42)
    assert found.best.change_pct == pytest.approx(-16)
    assert found.best.ci95_pct == pytest.approx((-20, -12))
    assert 0 < found.eta_s <= 6.0


def test_a_run_of_0_1_0_is_finished(tmp_path):
    shutil.copytree(RUN_OF_0_1_0, tmp_path / "old")
    [found] = summaries(tmp_path)
    assert (found.state, found.steps_done, found.steps_planned) == ("finished", 2, 2)
    assert found.best is not None


def test_an_old_run_with_a_checkpoint_of_its_last_step_was_stopped(tmp_path):
    run = write_run(tmp_path / "old", num_steps=8, planned=20)
    assert summaries(tmp_path)[0].state == "no sign of life"
    (run / "checkpoints" / "step-000008").mkdir(parents=True)
    assert summaries(tmp_path)[0].state == "stopped"


def test_the_last_written_run_is_first_and_damaged_or_empty_files_stop_nothing(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        run = write_run(tmp_path / name, status_values={})
        for file in run.iterdir():
            os.utime(file, (NOW - age, NOW - age))
    for name in (
        run_folder.METRICS_NAME,
        run_folder.VALIDATION_NAME,
        run_folder.CONFIG_NAME,
        run_folder.STATUS_NAME,
    ):
        (tmp_path / "middle" / name).write_bytes(b"\xff{]\n\n")
        os.utime(tmp_path / "middle" / name, (NOW - 1, NOW - 1))
    found = summaries(tmp_path)
    assert [each.name for each in found] == ["new", "middle", "old"]
    assert (found[1].steps_done, found[1].best) == (0, None)


def test_only_files_that_changed_are_read_again(tmp_path, monkeypatch):
    for name in "ab":
        write_run(tmp_path / name, status_values={})
    folder = Folder(tmp_path)
    kept = Summaries(folder)
    before = kept.of(("a", "b"))
    assert {each.steps_done for each in before} == {20}
    with (tmp_path / "a" / run_folder.METRICS_NAME).open("a") as file:
        file.write(lines([metrics_row(20)]))
    read = []
    original = Folder.read_end
    monkeypatch.setattr(
        Folder, "read_end", lambda self, path, n: read.append(path) or original(self, path, n)
    )
    after = {each.name: each.steps_done for each in kept.of(("a", "b", "vanished"))}
    assert after == {"a": 21, "b": 20}
    assert read == ["a/metrics.jsonl"]
