"""Stage zero on real and on broken files."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support import cli, crashing_work, videos
from tests.support.server import script
from wanlora.commands import prepare, verify
from wanlora.config import PrepareConfig, VerifyConfig
from wanlora.data import manifest
from wanlora.data.clip import clip_key
from wanlora.data.clip_frames import load_clip
from wanlora.errors import ConfigError, ManifestError, MediaError
from wanlora.media import recorded
from wanlora.processes import pool
from wanlora.processes.pool import map_in_processes

SMALL = {"num_frames": 17, "height": 48, "width": 80, "workers": 1, "val_fraction": 0.0}


def captioned(path, caption="a person walks"):
    path.with_suffix(".txt").write_text(caption)
    return path


def dataset(folder, count=4, **video):
    """Videos of 2.4 s, each of its own bytes."""
    for index in range(count):
        path = folder / ("walk" if index % 2 else "clap") / f"v{index}.mp4"
        captioned(videos.write_video(path, num_frames=60 + index, **video), f"caption {index}")
    return folder


def prepared(raw, output, **changes):
    return prepare.run(PrepareConfig(sources=(raw,), output=output, **(SMALL | changes)))


def errors_of(output):
    lines = (output / "errors.jsonl").read_text().splitlines()
    return {Path(row["path"]).name: row["code"] for row in map(json.loads, lines)}


def test_real_videos_become_clips_that_load(tmp_path):
    raw = tmp_path / "data" / "raw"
    for name, path in videos.real_videos().items():
        (raw / name).mkdir(parents=True)
        (raw / name / f"{name}.mp4").symlink_to(path)
        captioned(raw / name / f"{name}.mp4", f"a video of {name}")
    output = tmp_path / "data" / "processed"
    result = prepared(
        raw, output, num_frames=49, height=96, width=160, val_fraction=0.4, seed=2, scenes="allow"
    )
    assert result.buckets == {"49x96x160": 5}
    assert result.activities == {"bigbuckbunny": 1, "bikes": 3, "carphone_pristine": 1}
    assert (result.sources, result.failed, result.exit_code) == (3, 0, 0)
    clips = manifest.read_all([output])
    assert {c.split for c in clips} == {"train", "val"}
    bikes = [c for c in clips if c.activity == "bikes"]
    assert [c.start_s for c in bikes] == [0.0, 3.0625, 6.125]
    assert len({c.split for c in bikes}) == 1
    assert clips[0].source == "../raw/bigbuckbunny/bigbuckbunny.mp4"
    assert clips[0].orig["fps"] == 25.0
    checked = verify.run(VerifyConfig(manifests=(output,)))
    assert checked.exit_code == 0
    assert {clip.shape for clip in checked.loaded} == {(1, 49, 3, 96, 160)}


def test_the_summary_counts_everything_and_names_the_next_command(tmp_path):
    raw = dataset(tmp_path / "raw")
    captioned(videos.write_text(raw / "walk" / "text.mp4"))
    videos.write_video(raw / "walk" / "silent.mp4")
    result = prepared(raw, tmp_path / "out", val_fraction=0.3)
    text = "\n".join(result.lines())
    assert "6 found, 4 used" in text
    assert "8 (2.0 per source)" in text
    # A file's side is a hash of its bytes, and those depend on the release of the encoder.
    assert f"train {result.train}, val {result.val}" in text
    assert result.train + result.val == 8
    assert "17x48x80  8 clips, 75 tokens" in text
    assert re.search(r"clap  4 clips .*\b2 sources", text)
    assert "no_caption 1, unreadable 1" in text
    assert result.lines()[-1] == f"next: wanlora verify {tmp_path / 'out'}"
    assert result.exit_code == 3


def test_each_bad_file_is_listed_with_its_reason_and_stops_nothing(tmp_path):
    raw = dataset(tmp_path / "raw", 1)
    bad = raw / "bad"
    bad.mkdir()
    makers = {
        "no_video": videos.write_audio,
        "unreadable": videos.write_text,
        "truncated": videos.write_truncated,
        "corrupt_at": videos.write_bit_rotten,
        "hdr": lambda path: videos.write_video(path, transfer=videos.PQ),
        "low_fps": lambda path: videos.write_video(path, fps=8),
        "too_short": lambda path: videos.write_video(path, num_frames=20),
    }
    for code, make in makers.items():
        captioned(make(bad / f"{code}.mp4"))
    result = prepared(raw, tmp_path / "out")
    assert errors_of(tmp_path / "out") == {f"{code}.mp4": code for code in makers}
    assert (result.clips, result.failed, result.exit_code) == (2, 7, 3)
    lines = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert all(json.loads(line)["stage"] == "prepare" for line in lines)
    assert prepared(raw, tmp_path / "out", max_error_rate=0.9).exit_code == 0


def test_names_that_are_not_utf_8_are_listed_and_stop_nothing(tmp_path):
    raw = dataset(tmp_path / "raw", 1)
    captioned(raw / os.fsdecode(b"gr\xfcn.mp4")).write_bytes(b"")
    (raw / "metadata.jsonl").write_text('{"path": "\\udcff.mp4", "caption": "x"}\n')
    assert prepared(raw, tmp_path / "out").errors == {"bad_line": 1, "unreadable": 1}
    assert errors_of(tmp_path / "out") == {
        "metadata.jsonl:1": "bad_line", r"gr\xfcn.mp4": "unreadable",
    }  # fmt: skip


def test_low_fps_and_hdr_are_taken_on_request_with_a_warning(tmp_path):
    captioned(videos.write_video(tmp_path / "raw" / "slow.mp4", fps=8))
    captioned(videos.write_video(tmp_path / "raw" / "hdr.mp4", transfer=videos.HLG))
    result = prepared(tmp_path / "raw", tmp_path / "out", allow_low_fps=True, allow_hdr=True)
    assert result.failed == 0
    assert set(result.warnings) >= {"low_fps", "hdr"}


def test_short_videos_are_trimmed_with_a_warning_or_dropped(tmp_path):
    raw = dataset(tmp_path / "raw", 1)
    result = prepared(raw, tmp_path / "out", num_frames=81)
    (clip,) = manifest.read(tmp_path / "out" / "train.jsonl")
    assert clip.num_frames == 37
    assert load_clip(clip).shape[0] == 37
    assert result.warnings["trimmed"] == 1
    with pytest.raises(ManifestError, match="1 source: too_short 1"):
        prepared(raw, tmp_path / "out", num_frames=81, short="drop")


def test_too_short_expects_no_more_than_a_clip(tmp_path):
    captioned(videos.write_video(tmp_path / "v.mp4", num_frames=10))
    with pytest.raises(ManifestError, match=r"\b6 frames .*; .*\b9\n"):
        prepared(tmp_path / "v.mp4", tmp_path / "out", num_frames=9)


def test_head_takes_one_clip_a_video(tmp_path):
    assert prepared(dataset(tmp_path / "raw"), tmp_path / "out", mode="head").clips == 4


def test_the_number_of_workers_changes_no_byte(tmp_path):
    raw = dataset(tmp_path / "raw")
    captioned(videos.write_text(raw / "walk" / "text.mp4"))
    for workers in (1, 2):
        prepared(raw, tmp_path / str(workers), workers=workers, val_fraction=0.3)
    for name in ("train.jsonl", "val.jsonl", "errors.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_file_that_kills_or_hangs_its_process_fails_alone(tmp_path):
    paths = [tmp_path / name for name in ("a", "die1", "b", "hang", "die2", "slow")]
    for path in paths:
        path.write_bytes(b"12345")
    found = dict(map_in_processes(crashing_work.size_or_die, paths, workers=2, stall_s=6))
    assert set(found) == set(paths)
    for path in paths:
        outcome = found[path]
        if "die" in path.name or "hang" in path.name:
            assert isinstance(outcome, MediaError)
            assert outcome.code == "unreadable"
            assert ("killed" if "die" in path.name else "hung for 6 s") in str(outcome)
        else:
            assert outcome == 5


def test_processes_end_if_another_one_cannot_be_started(tmp_path, monkeypatch):
    started = []

    def start(*arguments, start_child=pool.start_child):
        if started:
            raise OSError("no more processes")
        started.append(start_child(*arguments))
        return started[0]

    monkeypatch.setattr(pool, "start_child", start)
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(OSError, match="no more processes"):
        list(map_in_processes(crashing_work.size_or_die, paths, workers=2, stall_s=60))
    assert not started[0][0].is_alive()


@pytest.mark.slow
def test_a_process_that_was_stopped_together_with_its_parent_has_not_hung(tmp_path, monkeypatch):
    """Ctrl-Z stops all of them; the parent may look before the others send a sign of life."""
    paths = [tmp_path / name for name in ("a", "slow")]
    for path in paths:
        path.write_bytes(b"12345")
    outcomes = map_in_processes(crashing_work.size_or_die, paths, workers=2, stall_s=6)
    found = dict([next(outcomes)])

    def paused(pipes: list, timeout: float) -> list:
        monkeypatch.undo()
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in multiprocessing.active_children():
                os.kill(process.pid, number)
            time.sleep(7 if number == signal.SIGSTOP else 0)
        return pipes[:0]

    monkeypatch.setattr(pool, "wait", paused)
    assert found | dict(outcomes) == dict.fromkeys(paths, 5)


def test_checking_processes_and_config_pull_in_no_torch(tmp_path):
    code = "import sys, wanlora.commands.prepare.check; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_clips_of_one_video_and_of_its_copies_share_a_split(tmp_path):
    raw = dataset(tmp_path / "raw", 6)
    for index in range(6):
        source = next(raw.glob(f"*/v{index}.mp4"))
        copy = raw / "copies" / f"copy{index}.mp4"
        copy.parent.mkdir(exist_ok=True)
        captioned(copy).write_bytes(source.read_bytes())
    result = prepared(raw, tmp_path / "out", val_fraction=0.4)
    splits: dict = {}
    for clip in manifest.read_all([tmp_path / "out"]):
        splits.setdefault(clip.source_sha256, set()).add(clip.split)
    assert len(splits) == 6
    assert all(len(split) == 1 for split in splits.values())
    assert result.warnings["duplicate"] == 12


def test_copies_of_one_name_get_names_of_their_own(tmp_path):
    for folder in ("a", "b"):
        captioned(videos.write_video(tmp_path / "raw" / folder / "v.mp4"))
    prepared(tmp_path / "raw", tmp_path / "out", mode="head")
    first, second = manifest.read(tmp_path / "out" / "train.jsonl")
    assert second.clip_id == f"{first.clip_id}-2"


def test_no_validation_leaves_no_old_val_file(tmp_path):
    raw = dataset(tmp_path / "raw")
    prepared(raw, tmp_path / "out", val_fraction=0.5)
    assert (tmp_path / "out" / "val.jsonl").exists()
    prepared(raw, tmp_path / "out", val_fraction=0.0)
    assert not (tmp_path / "out" / "val.jsonl").exists()
    assert len(manifest.read_all([tmp_path / "out"])) == 8


def test_a_folder_of_validation_clips_alone_is_a_data_set(tmp_path):
    raw = dataset(tmp_path / "raw", 1)
    prepared(raw, tmp_path / "out")
    (raw / "metadata.csv").write_text("path,text,split\nclap/v0.mp4,caption 0,val\n")
    result = prepared(raw, tmp_path / "out")
    assert not (tmp_path / "out" / "train.jsonl").exists()  # an old one would be trained on
    assert (result.train, result.val) == (0, 2)
    assert re.search(r"no training .*\bclap\b", "\n".join(result.notes))
    assert verify.run(VerifyConfig(manifests=(tmp_path / "out",))).exit_code == 0


def test_a_frame_rate_that_is_not_the_models_is_noted(tmp_path):
    raw = dataset(tmp_path / "raw", 1)
    assert not any("fps" in note for note in prepared(raw, tmp_path / "16").notes)
    (note,) = (n for n in prepared(raw, tmp_path / "8", fps=8.0).notes if "fps" in n)
    assert "16 fps" in note
    assert "8 fps" in note
    assert {clip.fps for clip in manifest.read_all([tmp_path / "8"])} == {8.0}


def test_editing_a_caption_changes_neither_ids_nor_keys_nor_split(tmp_path):
    raw = dataset(tmp_path / "raw")
    runs = []
    for caption in ("old", "new"):
        captioned(raw / "clap" / "v0.mp4", caption)
        prepared(raw, tmp_path / "out", val_fraction=0.3)
        clips = manifest.read_all([tmp_path / "out"])
        runs.append([(c.clip_id, c.split, clip_key(c, c.source_sha256)) for c in clips])
        assert caption in {c.prompt for c in clips}
    assert runs[0] == runs[1]


KILL_BEFORE_TRAIN = """
import os, signal, sys
from pathlib import Path
from wanlora.commands.prepare import prepare
from wanlora.config import PrepareConfig

rename = Path.replace
def replace(self, target):
    if Path(target).name == "train.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.replace = replace
prepare.run(PrepareConfig(sources=(Path(sys.argv[1]),), output=Path(sys.argv[2]), num_frames=17,
                          height=48, width=80, workers=1))
"""


def test_a_killed_run_leaves_the_old_manifest_whole(tmp_path):
    raw = dataset(tmp_path / "raw", 2)
    prepared(raw, tmp_path / "out")
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    captioned(videos.write_video(raw / "walk" / "new.mp4"))
    done = cli.server().run(script(KILL_BEFORE_TRAIN, raw, tmp_path / "out"))
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    assert len(manifest.read_all([tmp_path / "out"])) == 4


def test_npz_clips_are_taken_as_they_are_and_grouped_by_their_stem(tmp_path):
    raw = tmp_path / "raw"
    for video in range(4):
        for part in range(3):
            path = raw / f"v{video}_clip{part}.npz"
            captioned(videos.write_npz(path, num_frames=17 + 4 * video, width=48 + 16 * part))
    result = prepared(raw, tmp_path / "out", val_fraction=0.5, group_pattern=r"^(v\d+)_")
    clips = manifest.read_all([tmp_path / "out"])
    assert result.clips == 12
    groups: dict = {}
    for clip in clips:
        groups.setdefault(clip.source_group, set()).add(clip.split)
    assert set(groups) == {"v0", "v1", "v2", "v3"}
    assert all(len(splits) == 1 for splits in groups.values())
    assert load_clip(clips[0]).shape[1:] == (3, clips[0].height, clips[0].width)
    assert not any("group_pattern" in note for note in result.notes)
    leaky = prepared(raw, tmp_path / "out", val_fraction=0.5)
    assert any("group_pattern" in note for note in leaky.notes)


def test_a_group_pattern_without_a_group_is_a_usage_error(tmp_path):
    raw = dataset(tmp_path / "raw", 1)
    for pattern in ("v0", "("):
        with pytest.raises(ConfigError, match="group_pattern"):
            prepared(raw, tmp_path / "out", group_pattern=pattern)


def test_nothing_usable_is_refused_and_an_old_manifest_stays(tmp_path):
    prepared(dataset(tmp_path / "raw", 1), tmp_path / "out")
    captioned(videos.write_text(tmp_path / "bad.mp4"))
    with pytest.raises(ManifestError, match=r"(?s)unreadable 1.*errors\.jsonl"):
        prepared(tmp_path / "bad.mp4", tmp_path / "out")
    assert errors_of(tmp_path / "out") == {"bad.mp4": "unreadable"}
    assert len(manifest.read_all([tmp_path / "out"])) == 2


def test_what_sample_writes_is_taken_whole(tmp_path):
    """81 frames at 16 fps, in every format of `sample`: no frame is lost, and none comes twice."""
    frames = np.stack([videos.numbered_frame(k, height=96, width=160) for k in range(81)])
    for suffix in ("mp4", "webm", "gif"):
        path = tmp_path / "raw" / f"{suffix}.{suffix}"
        recorded.write(path, frames, record={"prompt": "numbers", "fps": 16.0})
        captioned(path)
    prepared(tmp_path / "raw", tmp_path / "out", num_frames=81, buckets=True)
    clips = manifest.read(tmp_path / "out" / "train.jsonl")
    assert {clip.num_frames for clip in clips} == {81}
    assert {clip.orig["repeated_frames"] for clip in clips} == {0}
    for clip in clips:
        found = load_clip(clip).permute(0, 2, 3, 1).numpy()
        assert [videos.number_in(frame) for frame in found] == list(range(81))
