"""`wanlora watch` reads only regular files below its folder, and finds its runs there."""

import os
import subprocess
import sys

import pytest
from filelock import FileLock

from tests.support.watched import write_run
from wanlora.commands.watch import run_files
from wanlora.commands.watch.run_files import Folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    (tmp_path / "outputs" / "run" / "metrics.jsonl").write_text("{}\n")
    return tmp_path / "outputs"


@pytest.mark.parametrize(
    "path",
    ["../secret.txt", "run/../../secret.txt", "/etc/passwd", "run//etc/passwd", "run/\0", "", "..",
     "run/metrics.jsonl/../../secret.txt", "run", ".", "missing", "run/missing"],
)  # fmt: skip
def test_only_files_below_the_folder_are_read(folder, path):
    assert Folder(folder).read(path) is None
    assert Folder(folder).version(path) is None


def test_a_link_is_not_followed_whether_file_or_folder(folder, tmp_path):
    (folder / "run" / "config.toml").symlink_to(tmp_path / "secret.txt")
    (folder / "run" / "inside.txt").symlink_to(folder / "run" / "metrics.jsonl")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    found = Folder(folder)
    for path in ("run/config.toml", "run/inside.txt", "linked/secret.txt"):
        assert found.read(path) is None, path
    assert found.files("linked") == []
    assert found.find_runs() == run_files.Found(("run",), ("linked",), False)


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert Folder(tmp_path / "link").find_runs().runs == ("run",)


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "run" / "validation.jsonl")
    assert Folder(folder).read("run/validation.jsonl") is None


def test_a_large_file_is_read_only_at_its_ends(folder):
    with (folder / "run" / "metrics.jsonl").open("wb") as file:
        file.write(b"start")
        file.truncate(2**40)
    found = Folder(folder)
    assert found.read("run/metrics.jsonl") is None
    assert found.read_start("run/metrics.jsonl", 5) == b"start"
    assert found.read_end("run/metrics.jsonl", 5) == bytes(5)


def test_runs_are_found_at_every_level_but_not_inside_runs_or_hidden_folders(tmp_path):
    for name in ("a", "demo/run", "x/y/z", "x/y/z/w/too-deep", ".hidden/run", "a/checkpoints/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "just-begun").mkdir()
    (tmp_path / "just-begun" / "status.json").touch()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "config.toml").touch()
    assert Folder(tmp_path).find_runs().runs == ("a", "demo/run", "just-begun", "x/y/z")


def test_a_folder_that_is_itself_a_run_has_that_run_alone(folder):
    (folder / "other").mkdir()
    (folder / "other" / "metrics.jsonl").touch()
    found = Folder(folder / "run")
    assert found.find_runs().runs == ("run",)
    assert found.read("run/metrics.jsonl") == b"{}\n"


def test_a_search_that_is_cut_reports_it(folder, monkeypatch):
    monkeypatch.setattr(run_files, "MAX_FOLDERS", 1)
    assert Folder(folder).find_runs() == run_files.Found((), (), True)


def test_a_folder_that_vanishes_has_no_runs(folder):
    found = Folder(folder)
    (folder / "run" / "metrics.jsonl").unlink()
    (folder / "run").rmdir()
    folder.rmdir()
    assert found.find_runs().runs == ()


def test_a_lock_is_seen_while_a_process_holds_it(tmp_path):
    run, found = write_run(tmp_path / "run"), Folder(tmp_path)
    assert found.is_locked("run") is False
    with FileLock(run / ".lock"):
        assert found.is_locked("run") is True
        assert found.is_locked("run") is True
    assert found.is_locked("run") is False


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    script = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(write_run(tmp_path / "run") / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert Folder(tmp_path).is_locked("run") is True
        process.kill()
        process.wait()
        assert Folder(tmp_path).is_locked("run") is False
