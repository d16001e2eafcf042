"""Killed and run again, and the files remembered."""

import json
import os
import signal
import time

from tests.support import videos
from tests.support.cli import start
from tests.support.stores import unprivileged, users_folder
from wanlora.commands import prepare
from wanlora.commands.prepare import check, sources
from wanlora.commands.prepare.journal import NAME
from wanlora.config import PrepareConfig
from wanlora.errors import LostProcessError, MediaError, PassingError

SMALL = {"num_frames": 17, "height": 48, "width": 80, "workers": 1, "val_fraction": 0.3}
FILES = ("train.jsonl", "val.jsonl", "errors.jsonl")


def dataset(folder, count):
    for index in range(count):
        path = folder / f"v{index}.mp4"
        if not path.exists():  # the encoder may write other bytes the second time
            videos.write_video(path, num_frames=60 + index)
        path.with_suffix(".txt").write_text(f"caption {index}")
    (videos.write_text(folder / "bad.mp4")).with_suffix(".txt").write_text("bad")
    return folder


def prepared(raw, output, **changes):
    return prepare.run(PrepareConfig(sources=(raw,), output=output, **(SMALL | changes)))


def counting(monkeypatch):
    checked = []
    real = check.check

    def spy(path, alive, *, detector):
        checked.append(path.name)
        return real(path, alive, detector=detector)

    monkeypatch.setattr(check, "check", spy)
    return checked


def test_a_second_run_checks_only_what_changed(tmp_path, monkeypatch):
    raw = dataset(tmp_path / "raw", 3)
    checked = counting(monkeypatch)
    prepared(raw, tmp_path / "out")
    assert sorted(checked) == ["bad.mp4", "v0.mp4", "v1.mp4", "v2.mp4"]
    before = [(tmp_path / "out" / name).read_bytes() for name in FILES if name != "val.jsonl"]
    checked.clear()
    prepared(raw, tmp_path / "out")
    assert checked == []
    assert before == [(tmp_path / "out" / n).read_bytes() for n in FILES if n != "val.jsonl"]
    os.utime(raw / "v1.mp4", ns=(1, 1))
    videos.write_video(raw / "bad.mp4")
    prepared(raw, tmp_path / "out", num_frames=33)
    assert sorted(checked) == ["bad.mp4", "v1.mp4"]
    checked.clear()
    prepared(raw, tmp_path / "out", scenes="allow")  # the same detector
    assert checked == []


def test_a_torn_or_foreign_journal_only_costs_time(tmp_path):
    raw = dataset(tmp_path / "raw", 2)
    prepared(raw, tmp_path / "whole")
    prepared(raw, tmp_path / "out")
    journal = tmp_path / "out" / NAME
    lines = journal.read_text().splitlines()
    entry = json.loads(lines[1])
    entry["video"] = {"unknown": 1}
    journal.write_text("\n".join([*lines[:1], json.dumps(entry), "[]", '{"a"', lines[-1][:50]]))
    prepared(raw, tmp_path / "out")
    for name in ("train.jsonl", "errors.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_killed_run_continues_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    raw = dataset(tmp_path / "raw", 12)
    prepared(raw, tmp_path / "whole")
    command = [
        "prepare", raw, "--output", tmp_path / "out", "--num-frames", 17, "--height", 48,
        "--width", 80, "--val-fraction", 0.3, "--workers", 2,
    ]  # fmt: skip
    running = start(*command)
    journal = tmp_path / "out" / NAME
    for _ in range(600):
        if journal.exists() and journal.read_text().count("sha256") >= 3:
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    known = journal.read_text().count('"path"')
    assert known >= 3
    assert not (tmp_path / "out" / "train.jsonl").exists() or known == 13
    checked = counting(monkeypatch)
    prepared(raw, tmp_path / "out")
    assert len(checked) == 13 - known
    for name in FILES:
        whole = tmp_path / "whole" / name
        assert (tmp_path / "out" / name).exists() == whole.exists()
        if whole.exists():
            assert (tmp_path / "out" / name).read_bytes() == whole.read_bytes()


def test_adding_a_video_moves_at_most_one_other_of_its_activity(tmp_path):
    """The encoder may write other bytes on another machine, so the draws are not known here."""
    raw = tmp_path / "raw"
    before = {}
    for count in (12, 13, 14):
        dataset(raw, count)
        prepared(raw, tmp_path / "out", mode="head")
        sides = {
            json.loads(line)["clip_id"]: name
            for name in ("train", "val")
            for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        }
        assert len(sides) == count
        assert set(sides.values()) == {"train", "val"}
        assert sum(sides[clip] != side for clip, side in before.items()) <= 1
        before = sides


def test_the_stage_survives_a_process_that_dies(tmp_path, monkeypatch):
    """The journal forgets it, so that the next run tries again."""
    raw = dataset(tmp_path / "raw", 2)

    def lossy(paths, **settings):
        for path in paths:
            if path.name == "v0.mp4":
                yield path, LostProcessError("unreadable", f"{path}: killed")
            else:
                yield path, check.check(path, lambda: None, detector="builtin")

    with monkeypatch.context() as patch:
        patch.setattr(sources, "check_all", lossy)
        assert prepared(raw, tmp_path / "out").errors == {"unreadable": 2}
    assert prepared(raw, tmp_path / "out").errors == {"unreadable": 1}


def test_what_may_pass_is_not_remembered(tmp_path):
    """A file that could not be opened is checked again, although it has not changed."""
    with users_folder() as home:
        raw = dataset(home / "raw", 2)
        (home / "out").mkdir()
        for path in home.rglob("*"):
            path.chmod(0o777)
        (raw / "v0.mp4").chmod(0)
        with unprivileged():
            assert prepared(raw, home / "out").errors == {"unreadable": 2}
        (raw / "v0.mp4").chmod(0o644)
        assert prepared(raw, home / "out").errors == {"unreadable": 1}


def test_running_out_of_memory_is_no_property_of_a_file(tmp_path, monkeypatch):
    def full(path):
        raise MemoryError

    monkeypatch.setattr(check.image, "read_checked", full)
    path = videos.write_text(tmp_path / "a.png")
    outcome = check.check(path, lambda: None, detector="builtin")
    assert isinstance(outcome, PassingError)
    monkeypatch.undo()
    outcome = check.check(path, lambda: None, detector="builtin")
    assert isinstance(outcome, MediaError)
    assert not isinstance(outcome, PassingError)
