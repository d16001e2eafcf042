"""Which checkpoints are continued, and what is said of the others."""

import json

import numpy as np
import pytest
import torch

from wanlora.errors import CheckpointError
from wanlora.runs import checkpoints
from wanlora.training.masters import Masters

IDENTITY = {"view_sha256": "ab" * 32, "variant": "micro"}


def load(folder, wanted=IDENTITY, **state):
    """Load a checkpoint that says this of itself and has no other file."""
    whole = {"version": checkpoints.VERSION, "identity": IDENTITY, "progress": {}} | state
    (folder / checkpoints.STATE_NAME).write_text(json.dumps(whole))
    parameter = torch.nn.Parameter(torch.zeros(1))
    checkpoints.load(
        folder, identity=wanted, masters=Masters({"a": parameter}), average=None,
        optimizer=torch.optim.SGD([parameter]),
    )  # fmt: skip


def test_a_checkpoint_of_another_view_is_refused_and_nobody_is_told_to_remove_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"view_sha256: found cdcd.*, wanted abab") as raised:
        load(tmp_path, identity=IDENTITY | {"view_sha256": "cd" * 32})
    message = str(raised.value)
    assert "run wanlora cache-latents" in message
    assert f"--init-adapter {tmp_path}" in message
    assert "Remove" not in message


def test_a_checkpoint_of_another_release_is_refused_and_kept(tmp_path):
    with pytest.raises(CheckpointError, match=r"version 9, expected 2: .*release") as raised:
        load(tmp_path, version=9)
    assert "Remove" not in str(raised.value)


def test_a_damaged_checkpoint_is_given_up_for_the_one_before_or_for_a_new_run(tmp_path):
    first, second = (tmp_path / "checkpoints" / f"step-{step:06d}" for step in (1, 2))
    for damage in ({"identity": 3}, {"numpy": "1", "torch": "1"}):
        second.mkdir(parents=True, exist_ok=True)
        with pytest.raises(CheckpointError, match="--init-adapter") as raised:
            load(second, **damage)
        assert "Remove" not in str(raised.value)
        first.mkdir()
        with pytest.raises(CheckpointError, match="Remove that folder"):
            load(second, **damage)
        first.rmdir()


def test_a_checkpoint_that_memory_is_too_small_for_is_not_called_damaged(tmp_path, monkeypatch):
    first = tmp_path / "checkpoints" / "step-000001"
    second = first.with_name("step-000002")
    for folder in (first, second):
        folder.mkdir(parents=True)

    def read(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checkpoints, "read_adapter", read)
    with pytest.raises(torch.OutOfMemoryError):
        load(second, numpy=np.__version__, torch=torch.__version__)


def test_a_checkpoint_of_the_first_version_has_no_fingerprint_of_its_base(tmp_path):
    """Everything else about it is compared; then its missing files are missed."""
    new = IDENTITY | {"base": "ef" * 32}
    for version, identity, error in (
        (1, IDENTITY, "cannot be continued"),
        (2, IDENTITY | {"base": "00" * 32}, "base: found 0000.*, wanted efef"),
    ):
        with pytest.raises(CheckpointError, match=error):
            load(tmp_path, wanted=new, version=version, identity=identity)


def test_what_was_validated_after_a_checkpoint_is_added_to_it(tmp_path):
    state = {"version": 1, "progress": {"step": 4}, "identity": IDENTITY}
    (tmp_path / checkpoints.STATE_NAME).write_text(json.dumps(state))
    progress = checkpoints.Progress(step=4, validated_step=4, best_step=4, best_weights="ema")
    checkpoints.replace_progress(tmp_path, progress)
    changed = json.loads((tmp_path / checkpoints.STATE_NAME).read_text())
    assert changed == {"version": 2, "progress": vars(progress), "identity": IDENTITY}
