"""`best/` and the progress of a run agree, wherever the run was killed."""

import os

import pytest

from tests.support.adapters import modules, pairs, tensors_of
from wanlora.adapters.file import LoraShape, read_adapter, save_adapter
from wanlora.commands.train.saving import _keep_best, restore_best
from wanlora.runs import run_folder
from wanlora.runs.checkpoints import Progress
from wanlora.training.validation import ADAPTER, EMA

PANEL = "panel"


def write(run_dir, step, weights=ADAPTER):
    """Write best/ as a run does."""
    tensors = tensors_of(pairs(modules(["blocks.N.attn1.to_q"], blocks=1)))
    facts = {"step": str(step), "weights": weights}
    save_adapter(run_dir / "best", tensors, LoraShape(rank=4, alpha=4.0), provenance=facts)


def found(run_dir):
    file = run_dir / "best" / run_folder.ADAPTER_NAME
    facts = read_adapter(file).provenance if file.exists() else {}
    return facts.get("step"), facts.get("weights")


def progress(step=4, **more):
    facts = {"panel": PANEL, "best_step": 2, "best_loss": 0.5, "best_weights": EMA, "stale": 1}
    return Progress(step=step, validated_step=step, **(facts | more))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint at step 4 of a run whose best is the average of step 2."""
    folder = tmp_path / "checkpoints" / "step-000004"
    folder.mkdir(parents=True)
    write(tmp_path, 2, EMA)
    _keep_best(tmp_path, folder, progress())
    return folder


def test_a_newer_best_than_the_checkpoint_is_replaced_by_the_checkpoints(tmp_path, checkpoint):
    write(tmp_path, 6)
    restored = restore_best(tmp_path, checkpoint, progress(), PANEL)
    assert found(tmp_path) == ("2", "ema")
    assert restored == progress()


def test_a_best_that_the_checkpoint_does_not_know_is_forgotten(tmp_path, checkpoint):
    write(tmp_path, 6)
    none = progress(best_step=None, best_loss=None, best_weights=None, stale=0)
    assert restore_best(tmp_path, checkpoint, none, PANEL).best_step is None
    assert found(tmp_path) == (None, None)


@pytest.mark.parametrize("where", ["live weights of the same step", "nothing"])
def test_a_best_that_is_nowhere_is_searched_again(tmp_path, checkpoint, where, caplog):
    (checkpoint / "best" / run_folder.ADAPTER_NAME).unlink()
    (tmp_path / "best" / run_folder.ADAPTER_NAME).unlink()
    if where != "nothing":
        write(tmp_path, 2, ADAPTER)
    restored = restore_best(tmp_path, checkpoint, progress(), PANEL)
    assert (restored.best_step, restored.best_loss, restored.stale) == (None, None, 0)
    assert found(tmp_path) == (None, None)
    assert "step 2" in caplog.text


def test_another_panel_resets_best_and_patience_and_keeps_the_adapter(tmp_path, checkpoint, caplog):
    restored = restore_best(tmp_path, checkpoint, progress(), "another")
    assert restored == Progress(step=4, panel="another")
    assert found(tmp_path) == (None, None)
    aside = tmp_path / "best-before-step-000004"
    assert read_adapter(aside).provenance["step"] == "2"
    assert str(aside) in caplog.text
    assert len(caplog.records) == 1


def test_a_run_without_validation_keeps_what_was_best(tmp_path, checkpoint):
    assert restore_best(tmp_path, checkpoint, progress(), None) == progress()
    assert found(tmp_path) == ("2", "ema")


def test_the_first_panel_of_a_run_is_not_a_change(tmp_path, caplog):
    assert restore_best(tmp_path, None, Progress(), PANEL) == Progress(panel=PANEL)
    assert not caplog.text


def test_a_best_that_was_moved_away_costs_no_checkpoint(tmp_path, caplog):
    folder = tmp_path / "checkpoints" / "step-000004"
    folder.mkdir(parents=True)
    _keep_best(tmp_path, folder, progress())
    assert str(tmp_path / "best") in caplog.text
    assert restore_best(tmp_path, folder, progress(), PANEL).best_step is None


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_keeps_its_best_when_a_newer_one_is_written(tmp_path, monkeypatch, links):
    folder = tmp_path / "checkpoints" / "step-000004"
    folder.mkdir(parents=True)
    if not links:

        def refuse(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
    write(tmp_path, 2, EMA)
    for _ in range(2):
        _keep_best(tmp_path, folder, progress())
    write(tmp_path, 6)
    kept = folder / "best"
    assert read_adapter(kept).provenance["step"] == "2"
    assert [path.name for path in kept.iterdir()] == [run_folder.ADAPTER_NAME]
