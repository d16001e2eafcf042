"""Which checkpoints are continued, and what is said of the others."""

import json

import pytest
import torch

from wanlora.errors import CheckpointError
from wanlora.step.masters import Masters
from wanlora.train import checkpoints

IDENTITY = {"view_sha256": "ab" * 32, "variant": "micro"}


def load(folder, **state):
    """Load a checkpoint that says this of itself and has no other file."""
    whole = {"version": checkpoints.VERSION, "identity": IDENTITY, "progress": {}} | state
    (folder / checkpoints.STATE_NAME).write_text(json.dumps(whole))
    parameter = torch.nn.Parameter(torch.zeros(1))
    checkpoints.load(
        folder, identity=IDENTITY, masters=Masters({"a": parameter}), average=None,
        optimizer=torch.optim.SGD([parameter]),
    )  # fmt: skip


def test_a_checkpoint_of_another_view_is_refused_and_nobody_is_told_to_remove_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"view_sha256: found cdcd.*, wanted abab") as raised:
        load(tmp_path, identity=IDENTITY | {"view_sha256": "cd" * 32})
    message = str(raised.value)
    assert "restore the manifest and run wanlora cache-latents" in message
    assert f"--init-adapter {tmp_path}" in message
    assert "Remove" not in message


def test_a_checkpoint_of_another_release_is_refused_and_kept(tmp_path):
    with pytest.raises(CheckpointError, match=r"has version 9, expected 1: .*release") as raised:
        load(tmp_path, version=9)
    assert "Remove" not in str(raised.value)


def test_a_checkpoint_without_its_files_is_given_up_for_the_one_before(tmp_path):
    for damage in ({"identity": 3}, {"numpy": "1", "torch": "1"}):
        with pytest.raises(CheckpointError, match=r"Remove that folder to continue from the one b"):
            load(tmp_path, **damage)
