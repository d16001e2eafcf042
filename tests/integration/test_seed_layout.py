"""Ready-made clips: 222 .npz files and data/processed/train.jsonl, read as they are."""

import json
import re
import warnings

import numpy as np
from torch.utils.data import DataLoader

from tests.support import videos
from wanlora import ClipDataset, collate_fn
from wanlora.commands import verify
from wanlora.config import VerifyConfig


def layout(root, count=222, **size):
    """`data/processed/train.jsonl` names `data/processed/clips/….npz` from the folder above."""
    clips = root / "data" / "processed" / "clips"
    rows = []
    for index in range(count):
        activity = ("clapping", "sitting", "walking")[index % 3]
        name = f"{activity}_{index // 3:03d}_clip{index % 2}.npz"
        videos.write_npz(clips / name, **size)
        rows.append(
            {"npz": f"data/processed/clips/{name}", "prompt": f"A person {activity}, {index}"}
        )
    manifest = root / "data" / "processed" / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def test_the_snippet_that_checks_a_data_set_works_on_222_clips(tmp_path, monkeypatch):
    layout(tmp_path, num_frames=5, height=32, width=48)
    monkeypatch.chdir(tmp_path)
    dataset = ClipDataset("data/processed/train.jsonl")
    dataloader = DataLoader(dataset, batch_size=1, shuffle=True, collate_fn=collate_fn)
    batch = next(iter(dataloader))
    assert len(dataset) == 222
    assert list(batch["frames"].shape) == [1, 5, 3, 32, 48]
    assert (batch["frames"].min(), batch["frames"].max()) == (-1, 1)
    assert batch["prompts"][0].startswith("A person ")


def test_two_clips_a_batch_in_the_full_size(tmp_path, monkeypatch):
    layout(tmp_path, count=2, num_frames=81, height=480, width=832)
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(
        ClipDataset("data/processed/train.jsonl"), batch_size=2, collate_fn=collate_fn
    )
    batch = next(iter(loader))
    assert list(batch["frames"].shape) == [2, 81, 3, 480, 832]
    assert len(batch["prompts"]) == 2


def test_verify_loads_all_222_and_plans_them(tmp_path):
    manifest = layout(tmp_path, num_frames=5, height=32, width=48)
    result = verify.run(VerifyConfig(manifests=(manifest,)))
    text = "\n".join(result.lines())
    assert re.search(r"\b222 of 222 clips .*\(5x32x48 222\)", text)
    assert "1,110 in 222 clips" in text
    assert result.exit_code == 0


def test_compressed_and_otherwise_named_arrays_are_the_same_clip(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    np.savez_compressed(folder / "a.npz", video=frames)
    (tmp_path / "train.jsonl").write_text('{"npz": "clips/a.npz", "caption": "x"}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        item = ClipDataset(tmp_path / "train.jsonl")[0]
    assert np.array_equal(
        ((item["frames"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), frames
    )
