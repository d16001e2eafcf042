"""Damaged files: none crashes, hangs or shows a traceback, and each is used or listed."""

import json

import pytest

from tests.support import cli, fuzz
from tests.support.clips import clip, write_manifest
from wanlora.commands import verify
from wanlora.config import VerifyConfig
from wanlora.errors import MEDIA_ERROR_CODES


def check(tmp_path, count):
    raw = tmp_path / "raw"
    written = fuzz.write_damaged(raw, fuzz.originals(tmp_path / "whole"), count)
    done = cli.run(
        "prepare", raw, "--output", tmp_path / "out", "--num-frames", 17, "--height", 48,
        "--width", 80, "--val-fraction", 0, "--workers", 2, "--set", "stall_s=30",
        exit_code=3, timeout=3000,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    errors, clips = (
        [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("errors.jsonl", "train.jsonl")
    )
    failed = {row["path"] for row in errors}
    used = {str((tmp_path / "out" / row["source"]).resolve()) for row in clips}
    assert failed.isdisjoint(used)
    assert failed | used == {str(path) for path in written}
    for row in errors:
        assert row["code"] in MEDIA_ERROR_CODES
        assert row["path"] in row["message"]
    assert not [row for row in errors if "killed" in row["message"] or "hung" in row["message"]]
    verified = cli.invoke("verify", tmp_path / "out", "--json")
    assert verified.exit_code in (0, 3)
    assert json.loads(verified.stdout)["failed"] == []
    check_loading(tmp_path / "unchecked", written)


def check_loading(folder, written):
    """Damage that comes after `prepare`: a clip of each file loads, or is listed."""
    kinds = dict.fromkeys(fuzz.IMAGES, "images") | {".npz": "npz"}
    clips = [
        clip(
            path.name, source=str(path), path=path, kind=kinds.get(path.suffix, "video"),
            num_frames=1 if path.suffix in fuzz.IMAGES else 17, height=48, width=80,
            start_s=number % 3 / 4,
        )
        for number, path in enumerate(written)
    ]  # fmt: skip
    folder.mkdir()
    write_manifest(folder / "train.jsonl", clips)
    result = verify.run(VerifyConfig(manifests=(folder,), model="none/here"))
    assert len(result.loaded) + len(result.failed) == result.total == len(written)
    assert {failed.code for failed in result.failed} <= MEDIA_ERROR_CODES
    assert result.failed


def test_forty_damaged_files(tmp_path):
    check(tmp_path, 40)


@pytest.mark.slow
def test_five_hundred_damaged_files(tmp_path):
    check(tmp_path, 500)
