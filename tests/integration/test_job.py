"""A whole job in one file, with real commands in their own processes."""

import json

import pytest

from tests.support import cli, videos
from tests.support.experts import pair_folder
from wanlora.commands.demo.demo import write_videos

CLIP = "num_frames = 17\nheight = 64\nwidth = 64\nfps = 8\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_prints_each_command_and_stops_at_a_stage_with_failures(home):
    (home / "videos").mkdir()
    videos.write_video(home / "videos" / "good.mp4", num_frames=80)
    (home / "videos" / "good.txt").write_text("a dog")
    (home / "videos" / "bad.mp4").write_text("not a video")
    (home / "videos" / "bad.txt").write_text("a cat")
    (home / "job.toml").write_text(
        f'[prepare]\nsources = ["videos"]\n{CLIP}[cache-latents]\nmodel = "micro"\n'
    )
    done = cli.run("run", "job.toml", "--json", cwd=home, exit_code=3)
    stages = json.loads(done.stdout)["stages"]
    assert [(stage["state"], stage["exit_code"]) for stage in stages] == [("failed", 3)]
    assert stages[0]["result"]["clips"] > 0
    assert f"$ {stages[0]['command']}" in done.stderr
    assert (home / "data" / "processed" / "train.jsonl").exists()
    assert not (home / "cache").exists()


def test_a_job_that_is_done_trains_nothing_again_and_a_longer_one_continues(cache_fp16, home):
    (home / "job.toml").write_text(
        f'[train]\ncache = "{cache_fp16}"\nmax_steps = 1\ndevice = "cpu"\n'
        "[train.lora]\nrank = 2\ntargets = '''blocks\\.\\d+\\.attn1\\.to_q'''\n"
        "[train.validation]\nevery = 0\n"
    )
    first = json.loads(cli.run("run", "job.toml", "--json", cwd=home).stdout)["stages"]
    again = json.loads(cli.run("run", "job.toml", "--json", cwd=home).stdout)["stages"]
    longer = cli.run("run", "job.toml", "--json", "--set", "train.max_steps=2", cwd=home)
    continued = json.loads(longer.stdout)["stages"]
    assert [stage["state"] for stage in (*first, *again, *continued)] == ["done", "skipped", "done"]
    assert first[0]["result"]["steps"] == 1
    assert "--resume" in continued[0]["command"]
    assert (continued[0]["result"]["resumed_from"], continued[0]["result"]["steps"]) == (1, 2)


def test_a_job_trains_an_expert(cache_fp16, home):
    (home / "job.toml").write_text(
        f'[train]\ncache = "{cache_fp16}"\nmodel = "{pair_folder(home / "pair")}"\n'
        'expert = "high"\nmax_steps = 1\ndevice = "cpu"\ntrackers = []\n'
        "[train.lora]\nrank = 2\n[train.validation]\nevery = 0\n"
    )
    [stage] = json.loads(cli.run("run", "job.toml", "--json", cwd=home).stdout)["stages"]
    assert stage["state"] == "done"
    assert "--expert high" in stage["command"]
    [summary] = json.loads(cli.run("watch", "outputs", "--json", cwd=home).stdout)["runs"]
    assert summary["expert"] == "high"


@pytest.mark.slow
def test_a_job_of_all_stages_can_be_repeated(home):
    write_videos(
        home / "videos",
        [("clapping", 500_000 + index, "val" if index >= 5 else "train") for index in range(7)],
    )
    (home / "job.toml").write_text(
        f'[prepare]\nsources = ["videos"]\n{CLIP}min_frames = 9\n[cache-latents]\nmodel = "micro"\n'
        "[train]\nmax_steps = 2\n[train.validation]\nnum_clips = 1\nnum_sigmas = 2\n"
        '[sample]\nprompt = ["a person clapping"]\nsteps = 2\n'
        "[evaluate]\nvideos_per_activity = 1\nnum_sigmas = 2\nsteps = 2\n"
    )
    first = json.loads(cli.run("run", "job.toml", "--json", cwd=home).stdout)["stages"]
    assert [stage["state"] for stage in first] == ["done"] * 5
    files = {
        path: path.stat().st_mtime_ns
        for folder in ("cache/store.zarr", "outputs/run/checkpoints", "outputs/run/samples")
        for path in (home / folder).rglob("*")
    }
    again = json.loads(cli.run("run", "job.toml", "--json", cwd=home).stdout)["stages"]
    assert [stage["state"] for stage in again] == ["done", "done", "skipped", "done", "done"]
    assert again[3]["result"]["kept"] == 1
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert (home / "outputs" / "run" / "evaluation" / "report.html").exists()
