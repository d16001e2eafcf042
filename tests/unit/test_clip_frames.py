"""From a line of a manifest to pixels, and the data set over it."""

import json
import os
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.support import videos
from tests.support.clips import clip
from wanlora.data import clip_frames
from wanlora.errors import ManifestError, MediaError
from wanlora.media import decode, source, transform

SEED_SNIPPET = """
from wanlora import ClipDataset, collate_fn
from torch.utils.data import DataLoader

# Load dataset
dataset = ClipDataset("data/processed/train.jsonl")
dataloader = DataLoader(dataset, batch_size=1, shuffle=True, collate_fn=collate_fn)

# Test one batch
batch = next(iter(dataloader))
print(f"Frames shape: {batch['frames'].shape}")  # Should be [1, 81, 3, 480, 832]
print(f"Value range: [{batch['frames'].min():.2f}, {batch['frames'].max():.2f}]")
print(f"Prompt: {batch['prompts'][0]}")
ds = ClipDataset('data/processed/train.jsonl')
print(f'Loaded {len(ds)} clips')
print(ds[0]['frames'].shape)
"""

SEED_BATCH_SNIPPET = """
from wanlora import ClipDataset, collate_fn
from torch.utils.data import DataLoader

ds = ClipDataset('data/processed/train.jsonl')
loader = DataLoader(ds, batch_size=2, collate_fn=collate_fn)
batch = next(iter(loader))
print(f'✅ Loaded batch: {batch[\"frames\"].shape}')
print(f'✅ Value range: [{batch[\"frames\"].min():.2f}, {batch[\"frames\"].max():.2f}]')
print(f'✅ Prompts: {batch[\"prompts\"]}')
"""


def write_dataset(folder, count, **size):
    rows = []
    for index in range(count):
        videos.write_npz(folder / "clips" / f"clip_{index}.npz", **size)
        rows.append({"npz": f"clips/clip_{index}.npz", "prompt": f"prompt {index}"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


def test_the_first_snippet_runs_on_a_full_size_clip(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path / "data/processed", 1, num_frames=81, height=480, width=832)
    monkeypatch.chdir(tmp_path)
    exec(SEED_SNIPPET, {})
    assert capsys.readouterr().out.splitlines() == [
        "Frames shape: torch.Size([1, 81, 3, 480, 832])",
        "Value range: [-1.00, 1.00]",
        "Prompt: prompt 0",
        "Loaded 1 clips",
        "torch.Size([81, 3, 480, 832])",
    ]


def test_the_batch_snippet_runs(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path / "data/processed", 3)
    monkeypatch.chdir(tmp_path)
    exec(SEED_BATCH_SNIPPET, {})
    assert capsys.readouterr().out.splitlines() == [
        "✅ Loaded batch: torch.Size([2, 17, 3, 32, 48])",
        "✅ Value range: [-1.00, 1.00]",
        "✅ Prompts: ['prompt 0', 'prompt 1']",
    ]


def test_npz_frames_keep_their_values_and_order(tmp_path):
    dataset = clip_frames.ClipDataset(str(write_dataset(tmp_path, 1)))
    frames = dataset[0]["frames"]
    assert frames.dtype == torch.float32
    assert torch.equal(frames[5, :, 9, 9], torch.full((3,), 5 / 127.5 - 1))


def test_signed_values_span_minus_one_to_one_exactly():
    signed = clip_frames.to_signed(torch.tensor([0, 255], dtype=torch.uint8))
    assert signed.tolist() == [-1.0, 1.0]


def test_video_clips_are_the_decoded_frames_resized(tmp_path):
    path = videos.write_video(
        tmp_path / "a.mp4", num_frames=60, clockwise=90, sample_aspect=Fraction(4, 3)
    )
    line = clip(path=path, start_s=0.5, height=64, width=96, transform={"sample_aspect": "3/4"})
    cut = decode.decode(path, start_s=0.5, fps=16, num_frames=17)
    wanted = transform.resize_and_crop(cut, height=64, width=96, sample_aspect=Fraction(3, 4))
    found = clip_frames.load_clip(line)
    assert found.shape == (17, 3, 64, 96)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("changes", [{"num_frames": 16}, {"height": 40}, {"num_frames": 0}])
def test_sizes_that_the_vae_would_cut_are_refused(tmp_path, changes):
    line = clip(path=videos.write_video(tmp_path / "a.mp4"), **changes)
    with pytest.raises(MediaError, match="expected") as raised:
        clip_frames.load_clip(line)
    assert raised.value.code == "bad_size"


def test_an_npz_that_is_not_what_the_manifest_says_is_refused(tmp_path):
    line = clip(kind="npz", path=videos.write_npz(tmp_path / "a.npz", num_frames=21))
    with pytest.raises(MediaError, match="expected 17x32x48, found 21x32x48"):
        clip_frames.load_clip(line)


def test_clips_of_two_sizes_do_not_share_a_batch(tmp_path):
    items = []
    for num_frames in (17, 21):
        manifest_path = write_dataset(tmp_path / str(num_frames), 1, num_frames=num_frames)
        items.append(clip_frames.ClipDataset(manifest_path)[0])
    with pytest.raises(ManifestError, match=r"different sizes.*\[17, 3, 32, 48\].*batch_size=1"):
        clip_frames.collate_fn(items)


def test_a_hash_is_remembered_until_the_file_changes(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    known: dict = {}
    first = source.source_sha256(path, known)
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    known = source.parse_hashes(source.hashes_document(known))
    size, mtime, _ = known[str(path)]
    known[str(path)] = (size, mtime, "remembered")
    assert source.source_sha256(path, known) == "remembered"
    os.utime(path, ns=(1, 1))
    assert source.source_sha256(path, known) == first


def test_a_damaged_memory_of_hashes_is_made_again():
    for document in (None, b"", b"[1]", b'{"a": 3}', b"\xff"):
        assert source.parse_hashes(document) == {}


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.avi"])
def test_the_first_frame_alone_is_that_of_the_clip(tmp_path, name):
    codec, setup = videos.KINDS[name]
    path = tmp_path / name
    videos.write_video(path, codec=codec, **setup)
    made = clip(path=path, source_sha256=None, start_s=0.4, num_frames=9, height=32, width=48)
    every = clip_frames.load_clip(made)
    first = clip_frames.load_unchanged(made, {}, num_frames=1)
    assert first.shape == (1, 3, 32, 48)
    assert torch.equal(first, every[:1])
    assert not torch.equal(first, every[4:5])


def test_the_first_frame_alone_is_that_of_an_npz_clip(tmp_path):
    path = tmp_path / "clip.npz"
    videos.write_npz(path)
    every = np.load(path)["frames"]
    sizes = dict(zip(("num_frames", "height", "width"), every.shape[:3], strict=True))
    made = clip(path=path, kind="npz", source_sha256=None, **sizes)
    first = clip_frames.load_unchanged(made, {}, num_frames=1)
    assert torch.equal(first, torch.from_numpy(every[:1]).permute(0, 3, 1, 2))
