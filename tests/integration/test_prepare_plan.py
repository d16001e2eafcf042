"""The plan before anything is written: table, JSON, contact sheet; and what it is made of."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.support import videos
from tests.support.cli import invoke
from wanlora.commands import prepare, verify
from wanlora.config import PrepareConfig, VerifyConfig, load
from wanlora.core.buckets import Bucket
from wanlora.cost.sizes import cache_bytes
from wanlora.data import manifest
from wanlora.data.clip_frames import ClipDataset, load_clip
from wanlora.data.contact_sheet import crop_box
from wanlora.errors import ConfigError, ManifestError

SMALL = {"num_frames": 17, "height": 48, "width": 80, "workers": 1, "val_fraction": 0.0}


def captioned(path, caption="a person walks"):
    path.with_suffix(".txt").write_text(caption)
    return path


def prepared(raw, output, **changes):
    return prepare.run(PrepareConfig(sources=(raw,), output=output, **(SMALL | changes)))


def small_set(folder):
    """Two activities, a copy, a nearly equal caption, a long one, and a broken file."""
    walk, clap = folder / "walk", folder / "clap"
    captioned(videos.write_video(walk / "a.mp4"), "a person walks down a long empty street")
    captioned(videos.write_video(walk / "b.mp4", num_frames=61), "word " * 600)
    clap.mkdir()
    shutil.copy(walk / "a.mp4", clap / "c.mp4")
    captioned(clap / "c.mp4", "A person walks down a long, empty street!")
    captioned(videos.write_video(clap / "d.mp4", num_frames=62), "two hands <b>clap</b>")
    captioned(videos.write_text(clap / "e.mp4"))
    return folder


def test_a_dry_run_says_everything_and_writes_no_manifest(tmp_path):
    raw = small_set(tmp_path / "raw")
    result = prepared(raw, tmp_path / "out", dry_run=True)
    text = "\n".join(result.lines())
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".prepare-scan.jsonl"]
    assert re.search(r"unreadable: .*e\.mp4", text)
    assert "136 in 8 clips, 8.5 s" in text
    assert "17x48x80  8 clips, 75 tokens each" in text
    assert re.search(r"clap  4 clips .*\b2 sources", text)
    assert re.search(r"largest .*\b1\.0 times", text)
    assert re.search(r"too long .*\b781 tokens, .*\b512", text)
    assert re.search(r"nearly same .*1 pair .*80 %", text)
    assert "[A | a] person walks down a [long, | long] empty [street! | street]" in text
    assert "same bytes" in text
    assert "clap/c.mp4 = ../raw/walk/a.mp4" in text
    assert re.search(r"cache .*estimated", text)
    assert re.search(r"stage one .*H100 \(predicted\)", text)
    assert "unreadable 1" in text
    assert "dry run" in text
    plan = result.plan
    clips = {Bucket(17, 48, 80): 8}
    assert plan.cache_bytes == cache_bytes(clips, 11 + 11 + 512 + 7)
    assert [p.bucket for p in result.planned] == ["17x48x80"] * 8


def grouped_clips(folder, names):
    """Clips of one source group each; `walk/3` is of the activity walk."""
    rows = []
    for name in names:
        videos.write_npz(folder / f"{name}.npz")
        row = {"path": f"{name}.npz", "prompt": "a person moves", "source_group": name}
        rows.append(json.dumps(row | {"activity": name.split("/")[0]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_the_plan_of_a_small_set_names_what_lacks_clips_and_the_share_that_helps(tmp_path):
    """16 videos of 4 activities, and one alone in a fifth."""
    names = [f"{name}/{k}" for name in ("clap", "jump", "sit", "walk") for k in range(4)]
    raw = grouped_clips(tmp_path / "raw", [*names, "run/0"])

    def plan(val_fraction):
        result = prepared(raw, tmp_path / "out", val_fraction=val_fraction)
        return result, "\n".join(result.notes)

    few, notes = plan(0.05)
    assert (few.train_groups, few.val_groups) == (16, 1)
    assert "1 of 17 source groups" in notes
    assert "--val-fraction 0.4" in notes  # six groups
    assert re.search(r"validation clip of (\w+, ){2}\w+: --val-fraction 0.25", notes)
    assert re.search(r"validation .* run: .*group", notes)
    balanced, notes = plan(0.3)
    assert (balanced.train_groups, balanced.val_groups) == (12, 5)
    assert {name: row.val for name, row in balanced.plan.activities.items()}["run"] == 0
    assert all(row.train >= 2 for row in balanced.plan.activities.values() if row.clips > 1)
    enough, notes = plan(0.4)
    assert enough.val_groups == 7
    assert "held out: " not in notes
    row = next(line for line in enough.lines() if line.startswith("split"))
    for fact in ("train 10, val 7", "10 and 7 source groups", "41%", "--val-fraction 0.4"):
        assert fact in row


def test_clips_that_leave_the_held_out_side_are_counted(tmp_path):
    raw = grouped_clips(tmp_path / "raw", [f"walk/{k}" for k in range(8)])
    assert prepared(raw, tmp_path / "out", val_fraction=0.5).val == 4
    moved = prepared(raw, tmp_path / "out", val_fraction=0.25)
    assert moved.val == 2
    assert any(re.match(r"2 clips .*held out", note) for note in moved.notes)


def test_a_dry_run_is_json_with_every_clip_and_every_reason(tmp_path):
    raw = small_set(tmp_path / "raw")
    done = invoke(
        "prepare", raw, "--output", tmp_path / "out", "--num-frames", 17, "--height", 48,
        "--width", 80, "--workers", 1, "--dry-run", "--json",
    )  # fmt: skip
    assert done.exit_code == 3
    found = json.loads(done.stdout)
    assert len(found["planned"]) == 8
    assert [path for _, _, path in found["dropped"]] == [str(raw / "clap" / "e.mp4")]
    assert found["plan"]["captions"]["tokenizer"] is None
    assert found["plan"]["duplicate_sources"] == [["../raw/clap/c.mp4", "../raw/walk/a.mp4"]]


def test_the_tokenizer_of_a_local_model_counts_exactly(tmp_path, micro_folder):
    raw = small_set(tmp_path / "raw")
    result = prepared(raw, tmp_path / "out", model=str(micro_folder))
    assert result.plan.captions.tokenizer == str(micro_folder / "tokenizer")
    assert "estimated: no tokenizer" not in "\n".join(result.lines())
    assert result.warnings["caption_truncated"] == 2


def test_a_page_shows_the_first_clips_and_how_many_there_are(tmp_path):
    raw = tmp_path / "raw"
    sheet_of(tmp_path)
    page = tmp_path / "few.html"
    prepared(raw, tmp_path / "out", html=page, html_clips=2)
    assert page.read_text().count("data:image/jpeg;base64,") == 3 * 2
    assert "first 2 of 8" in page.read_text()


def sheet_of(tmp_path):
    raw = small_set(tmp_path / "raw")
    prepared(raw, tmp_path / "out", html=tmp_path / "new" / "sheet.html")
    return tmp_path / "new" / "sheet.html"


def test_the_contact_sheet_shows_three_frames_and_a_crop_box_for_each_clip(tmp_path):
    html = sheet_of(tmp_path).read_text()
    assert html.count("data:image/jpeg;base64,") == 3 * 8
    assert html.count('role="img"') == 8
    assert "two hands &lt;b&gt;clap&lt;/b&gt;" in html
    assert "Not used: 1" in html
    assert "e.mp4" in html
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_the_contact_sheet_opens_and_sorts_in_a_browser(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Debian's chromium is not installed")
    page = sheet_of(tmp_path)
    click = "document.querySelectorAll('th')[5].click();"  # tokens: up, then down
    probe = f"<script>{click}{click}</script>"
    page.write_text(page.read_text().replace("</body>", probe + "</body>"))
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    body = done.stdout.split("<tbody>")[1]
    assert 'data-order="down"' in done.stdout
    assert body.index("about 781") < body.index("about 7<")
    assert body.count("<img") == 24


def test_the_sheet_of_verify_shows_what_loads_and_what_does_not(tmp_path):
    videos.write_npz(tmp_path / "good.npz")
    videos.write_npz(tmp_path / "odd.npz", width=40)
    lines = [json.dumps({"npz": f"{name}.npz", "prompt": name}) for name in ("good", "odd")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    verify.run(VerifyConfig(manifests=(tmp_path,), html=tmp_path / "sheet.html"))
    html = (tmp_path / "sheet.html").read_text()
    assert "Clips: 1" in html
    assert "bad_size" in html


def test_the_crop_box_is_what_is_kept(tmp_path):
    captioned(videos.write_video(tmp_path / "raw" / "a.mp4", height=96, width=256))
    prepared(tmp_path / "raw", tmp_path / "out")
    (clip, _) = manifest.read(tmp_path / "out" / "train.jsonl")
    assert crop_box(clip) == (48, 0, 160, 96)


def test_buckets_keep_aspect_and_length(tmp_path):
    raw = tmp_path / "raw"
    for name, height, width, count in (
        ("wide", 96, 160, 120), ("tall", 160, 96, 130), ("square", 128, 128, 60),
    ):  # fmt: skip
        made = raw / f"{name}.mp4"
        captioned(videos.write_video(made, height=height, width=width, num_frames=count))
    result = prepared(raw, tmp_path / "out", num_frames=49, height=96, width=160, buckets=True)
    assert result.buckets == {"33x112x112": 1, "49x160x96": 1, "49x96x160": 1}
    for clip in manifest.read(tmp_path / "out" / "train.jsonl"):
        assert load_clip(clip).shape == (clip.num_frames, 3, clip.height, clip.width)


def test_lengths_are_few_at_one_size_where_they_are_named(tmp_path):
    raw = tmp_path / "raw"
    for count in (60, 44, 40, 30):  # 38, 28, 25 and 19 frames at 16 a second
        captioned(videos.write_video(raw / f"{count}.mp4", num_frames=count))
    result = prepared(raw, tmp_path / "out", num_frames=33, lengths=(17, 25))
    assert result.buckets == {"33x48x80": 1, "25x48x80": 2, "17x48x80": 1}
    with pytest.raises(ConfigError, match="lengths 49: expected min_frames 17 to num_frames 33"):
        load(PrepareConfig, flags={"sources": (raw,), "num_frames": 33, "lengths": (49,)})
    with pytest.raises(ConfigError, match="use 21 or 25"):
        load(PrepareConfig, flags={"sources": (raw,), "lengths": (24,)})
    with pytest.raises(ManifestError, match=r"\b19 frames at 16 fps; .*\b25"):
        prepared(raw / "30.mp4", tmp_path / "out", num_frames=33, lengths=(25,))


def test_images_become_clips_of_one_frame_beside_videos(tmp_path):
    raw = tmp_path / "raw"
    captioned(videos.write_video(raw / "films" / "a.mp4"))
    (raw / "stills").mkdir()
    Image.fromarray(np.zeros((96, 160, 3), np.uint8)).save(raw / "stills" / "b.png")
    captioned(raw / "stills" / "b.png", "a still")
    (raw / "stills" / "c.jpg").write_bytes(b"no image")
    captioned(raw / "stills" / "c.jpg")
    result = prepared(raw, tmp_path / "out")
    assert result.buckets == {"17x48x80": 2, "1x48x80": 1}
    assert result.errors == {"unreadable": 1}
    still = manifest.read(tmp_path / "out" / "train.jsonl")[-1]
    assert (still.kind, still.fps) == ("images", 16.0)
    assert load_clip(still).shape == (1, 3, 48, 80)
    assert verify.run(VerifyConfig(manifests=(tmp_path / "out",))).exit_code == 0


def test_no_clip_crosses_a_scene_cut_unless_allowed(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    captioned(videos.write_scenes(raw / "a.mp4", [40, 60, 20]))
    prepared(raw, tmp_path / "out")
    found = manifest.read(tmp_path / "out" / "train.jsonl")
    assert [c.start_s for c in found] == pytest.approx([0, 1.6, 1.6 + 17 / 16])
    assert load_clip(found[1])[0].float().sub(load_clip(found[1])[-1].float()).abs().mean() < 60
    result = prepared(raw, tmp_path / "out", scenes="allow")
    assert (result.clips, result.warnings["scene_cut"]) == (4, 2)
    with pytest.raises(ManifestError, match="too_short 1"):
        prepared(raw, tmp_path / "out", num_frames=49, short="drop")
    (row,) = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert re.search(r"\b3 scenes .*\b38 frames", json.loads(row)["message"])


def test_pyscenedetect_that_is_missing_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scenedetect", None)
    captioned(videos.write_video(tmp_path / "raw" / "a.mp4"))
    with pytest.raises(ConfigError, match=r"pip install 'wanlora\[scenes\]'"):
        prepared(tmp_path / "raw", tmp_path / "out", scenes="pyscenedetect")


def test_trigger_words_stand_before_every_caption_once(tmp_path):
    raw = tmp_path / "raw"
    captioned(videos.write_video(raw / "a.mp4"), "a dog runs")
    captioned(videos.write_video(raw / "b.mp4", num_frames=61), "ohwx dog, it sleeps")
    prepared(raw, tmp_path / "out", caption_prefix="ohwx dog,", mode="head")
    found = manifest.read(tmp_path / "out" / "train.jsonl")
    assert [c.prompt for c in found] == ["ohwx dog, a dog runs", "ohwx dog, it sleeps"]


def test_several_captions_reach_the_manifest(tmp_path):
    raw = tmp_path / "raw"
    videos.write_video(raw / "a.mp4")
    (raw / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": ["one", "two", "one"]}\n')
    prepared(raw, tmp_path / "out", mode="head")
    assert manifest.read(tmp_path / "out" / "train.jsonl")[0].prompts == ("one", "two")


def test_materialized_clips_hold_the_same_pixels_and_load_as_a_plain_data_set(tmp_path):
    raw = small_set(tmp_path / "raw")
    prepared(raw, tmp_path / "plain")
    before = {c.clip_id: load_clip(c) for c in manifest.read(tmp_path / "plain" / "train.jsonl")}
    result = prepared(raw, tmp_path / "out", materialize="npz")
    after = manifest.read(tmp_path / "out" / "train.jsonl")
    assert result.clips == 8
    assert {c.kind for c in after} == {"npz"}
    assert all(np.array_equal(load_clip(c), before[c.clip_id]) for c in after)
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)  # the folder stands alone
    shutil.rmtree(raw)
    item = ClipDataset(moved / "train.jsonl")[0]
    assert tuple(item["frames"].shape) == (17, 3, 48, 80)
    with np.load(next((moved / "clips").iterdir())) as archive:
        assert archive.files == ["frames"]


@pytest.mark.parametrize("survivors", [0, 1])
def test_clips_that_cannot_be_materialized_are_listed(tmp_path, monkeypatch, survivors):
    from wanlora.commands.prepare import materialize
    from wanlora.errors import MediaError

    raw = tmp_path / "raw"
    captioned(videos.write_video(raw / "v.mp4"))
    load, loaded = materialize.load_unchanged, []

    def failing(clip, known):
        loaded.append(clip)
        if len(loaded) > survivors:
            raise MediaError("missing", f"{clip.path} is gone")
        return load(clip, known)

    monkeypatch.setattr(materialize, "load_unchanged", failing)
    if not survivors:
        with pytest.raises(ManifestError, match="1 source: missing 2"):
            prepared(raw, tmp_path / "out", materialize="npz")
        assert not (tmp_path / "out" / "train.jsonl").exists()
        return
    result = prepared(raw, tmp_path / "out", materialize="npz")
    assert (result.failed, result.used, result.clips, result.exit_code) == (1, 1, 1, 3)
    assert "1 found, 1 used" in "\n".join(result.lines())


def test_a_column_overrules_the_draw_and_must_not_contradict_itself(tmp_path):
    raw = tmp_path / "raw"
    for index in range(3):
        videos.write_video(raw / f"{index}.mp4", num_frames=60 + index)
    rows = [{"path": f"{i}.mp4", "text": "x", "split": "val" if i == 1 else ""} for i in range(3)]
    (raw / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared(raw, tmp_path / "out")
    assert {c.path.name for c in manifest.read(tmp_path / "out" / "val.jsonl")} == {"1.mp4"}
    for row in rows:
        row["group"] = "one"
    rows[0]["split"] = "train"
    (raw / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ManifestError, match=r"group one .* both"):
        prepared(raw, tmp_path / "out")


def test_a_crop_of_over_30_percent_is_a_warning_that_names_the_flag(tmp_path):
    raw = tmp_path / "raw"
    captioned(videos.write_video(raw / "portrait.mp4", width=48, height=96))
    captioned(videos.write_video(raw / "wide.mp4", width=96, height=64))
    result = prepared(raw, tmp_path / "out", mode="head")
    assert result.warnings["cropped"] == 1
    assert any("--buckets" in note and note.startswith("1 clips") for note in result.notes)
    (portrait,) = [c for c in manifest.read(tmp_path / "out" / "train.jsonl") if "cropped: 30 %" in
                   " ".join(c.warnings) or "cropped: 30%" in " ".join(c.warnings)]  # fmt: skip
    assert portrait.path.name == "portrait.mp4"
    kept = prepared(raw, tmp_path / "kept", mode="head", buckets=True)
    assert "cropped" not in kept.warnings


def test_materialized_clips_are_not_sources_of_the_next_run(tmp_path):
    data = tmp_path / "data"
    captioned(videos.write_video(data / "clips" / "v.mp4"))
    videos.write_npz(data / "clips" / "mine.npz", num_frames=17, height=48, width=80)
    (data / "clips" / "mine.txt").write_text("my own clip")
    first = prepared(data, data, materialize="npz")
    again = prepared(data, data, materialize="npz")
    assert (again.sources, again.clips) == (first.sources, first.clips)
    assert any(f"{first.clips} files" in note for note in again.notes)
    written = sorted((data / "clips").glob("*fps.npz"))
    captioned(written[0])
    assert prepared(written[0], tmp_path / "other").clips == 1  # named by the user


def test_a_prefix_without_captions_is_refused_with_that_reason(tmp_path):
    videos.write_video(tmp_path / "raw" / "a.mp4")
    with pytest.raises(ManifestError, match="--caption-prefix"):
        prepared(tmp_path / "raw", tmp_path / "out", caption_prefix="ohwx dog")
