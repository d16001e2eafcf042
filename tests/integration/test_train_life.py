"""A run's life: what is measured is what is kept, and what a stop or a restart leaves."""

import json
import math
import os
import shutil
import signal
import tomllib
from pathlib import Path

import pytest
import torch

from tests.support import cli
from tests.support.watched import state
from wanlora.adapters.file import read_adapter
from wanlora.commands.evaluate import run as evaluate
from wanlora.commands.train import loop
from wanlora.commands.train import run as train
from wanlora.config import EvaluateConfig, TrainConfig
from wanlora.errors import CorruptRowError, NonFiniteError, RunError
from wanlora.runs import run_folder
from wanlora.store.views import read_view
from wanlora.training.batches import BatchSource

PANEL = {"num_clips": 3, "num_sigmas": 2}
FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0.1.0"


@pytest.fixture(autouse=True)
def sigterm_stops_the_tests():
    """A run that SIGTERM stopped leaves it ignored, for its process is about to exit."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def cache(held_out_cache):
    """Nine clips of three activities, three of them held out."""
    return held_out_cache


def config(cache, run_dir, *, validation=None, optimizer=None, rate=1e-3, **values):
    settings = {
        "cache": cache, "output_dir": run_dir, "learning_rate": rate, "trackers": [],
        "lora": {"rank": 2, "targets": "attention"},
        "optimizer": {"warmup_steps": 0} | (optimizer or {}),
        "validation": PANEL | {"train_clips": False} | (validation or {}),
    }  # fmt: skip
    return TrainConfig.model_validate(settings | values)


def rows(run_dir):
    return run_folder.read_rows(run_dir, run_folder.VALIDATION_NAME)


def progress(run_dir):
    state = run_folder.newest_checkpoint(run_dir) / "state.json"
    return json.loads(state.read_text())["progress"]


def measured_by_evaluate(cache, adapter, folder, **values):
    settings = {
        "cache": cache, "output_dir": folder, "adapter": (str(adapter),), "videos_per_activity": 0,
    }  # fmt: skip
    evaluate(EvaluateConfig.model_validate(settings | PANEL | values))
    return json.loads((folder / "evaluation.json").read_text())["validation"]


@pytest.mark.parametrize(
    ("max_steps", "ema_decay", "rate", "weights"),
    [(6, 0.0, 1e-3, "adapter"), (6, 0.99, 1e-3, "adapter"), (3, 0.9, 0.3, "ema")],
)
def test_best_is_exactly_what_was_measured(
    cache, tmp_path, caplog, max_steps, ema_decay, rate, weights
):
    run_dir = tmp_path / "run"
    result = train(
        config(cache, run_dir, max_steps=max_steps, rate=rate, ema_decay=ema_decay,
               validation={"every": 3}, optimizer={"max_grad_norm": 0})
    )  # fmt: skip
    best = progress(run_dir)
    found = measured_by_evaluate(cache, run_dir / "best", tmp_path / "best")
    assert best["best_weights"] == weights
    assert (found["adapter"], found["base"]) == (best["best_loss"], rows(run_dir)[0]["base_mean"])
    assert found["adapter"] == min(row["mean"] for row in rows(run_dir))
    (kept,) = [row for row in rows(run_dir) if row["mean"] == found["adapter"]]
    assert (kept["step"], kept["weights"]) == (best["best_step"], weights)
    measured = {"adapter", "ema"} if ema_decay else {"adapter"}
    assert {row["weights"] for row in rows(run_dir)} == measured
    facts = read_adapter(run_dir / "best").provenance
    assert (facts["step"], facts["weights"]) == (str(best["best_step"]), weights)
    assert result.best == kept
    # The card and the last line name the same adapter and number.
    average = ", moving average" if weights == "ema" else ""
    card = (run_dir / "README.md").read_text()
    assert f"best (step {kept['step']}{average}) | {kept['mean']:.4f}" in card
    assert f"{kept['mean']:.4f}" in next(line for line in result.lines() if "best" in line)
    assert f"{kept['mean']:.4f} at step" in (run_dir / "run.html").read_text()
    last = rows(run_dir)[-1]
    assert (last["step"], last["weights"]) == (max_steps, "adapter")
    assert ("worse than" in caplog.text) == (last["difference"] > 0)
    if ema_decay:
        again = measured_by_evaluate(cache, run_dir / "ema", tmp_path / "ema")
        average = [row["mean"] for row in rows(run_dir) if row["weights"] == "ema"]
        assert again["adapter"] == average[-1]


def test_another_panel_is_another_race(cache, tmp_path, caplog):
    """Losses of other clips or noise levels neither win nor count as stale."""
    train(config(cache, tmp_path, max_steps=2, validation={"every": 1}))
    first = progress(tmp_path)
    assert first["best_step"] == 2
    same = {"every": 1, "patience": 1}
    train(config(cache, tmp_path, max_steps=3, resume=True, validation=same))
    assert progress(tmp_path)["panel"] == first["panel"]
    assert "start again" not in caplog.text
    easier = same | {"num_sigmas": 1}
    result = train(config(cache, tmp_path, max_steps=4, resume=True, validation=easier))
    # Step 3 is measured again on the new panel, then step 4.
    assert result.stopped is None
    assert caplog.text.count("start again") == 1
    second = progress(tmp_path)
    new = [row for row in rows(tmp_path) if row["panel"] == second["panel"]]
    assert [row["step"] for row in new] == [3, 4]
    assert second["panel"] != first["panel"]
    assert second["best_loss"] == min(row["mean"] for row in new)
    assert read_adapter(tmp_path / "best-before-step-000003").provenance["step"] == "3"


def test_a_start_takes_nothing_from_an_attempt_without_a_checkpoint(cache, tmp_path):
    """Perhaps of another model: its base losses and its best would be wrong."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    settings = {"max_steps": 1, "ema_decay": 0.5, "validation": {"every": 1}}
    train(config(cache, whole, **settings))
    shutil.copytree(whole, run_dir)
    make_unfinished(run_dir)
    base = json.loads((whole / run_folder.BASE_LOSSES_NAME).read_text())
    wrong = dict.fromkeys(base, [[9.0] * 2] * 3)
    (run_dir / run_folder.BASE_LOSSES_NAME).write_text(json.dumps(wrong))
    for validation in ({"every": 1}, {"every": 0}):
        train(config(cache, run_dir, **settings | {"validation": validation}))
        if validation["every"]:
            assert rows(run_dir) == rows(whole)
        else:
            assert not (run_dir / "best").exists()
            assert not (run_dir / run_folder.BASE_LOSSES_NAME).exists()
        make_unfinished(run_dir)


def make_unfinished(run_dir):
    """Leave what a run has that was killed before its first checkpoint."""
    for folder in ("checkpoints", "ema"):
        shutil.rmtree(run_dir / folder)
    for name in (run_folder.ADAPTER_NAME, run_folder.CARD_NAME):
        (run_dir / name).unlink()


def held_out(cache):
    """One of the held-out clips."""
    clips = read_view(cache, "default").clips
    return next(clip.clip_id for clip in clips if clip.split == "val")


def damage(monkeypatch, clip_id, value=None):
    """Make one clip's latents unreadable, or full of a value."""
    original = BatchSource.latents

    def latents(self, clip):
        if clip.clip_id != clip_id:
            return original(self, clip)
        if value is None:
            raise CorruptRowError(f"{clip.clip_id} is damaged")
        return torch.full_like(original(self, clip), value)

    monkeypatch.setattr(BatchSource, "latents", latents)


@pytest.mark.parametrize(("value", "error"), [(None, CorruptRowError), (math.nan, NonFiniteError)])
def test_a_damaged_held_out_clip_stops_a_run_before_its_first_step(
    cache, tmp_path, monkeypatch, value, error
):
    clip_id = held_out(cache)
    damage(monkeypatch, clip_id, value)
    with pytest.raises(error, match=clip_id):
        train(config(cache, tmp_path / "run", max_steps=2))
    assert not (tmp_path / "run").exists()


def test_a_validation_that_is_not_finite_names_the_clip_and_loses_no_step(
    cache, tmp_path, monkeypatch
):
    original, clip_id = loop._follow_up, held_out(cache)

    def follow_up(*arguments, **options):
        damage(monkeypatch, clip_id, math.nan)
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "_follow_up", follow_up)
    with pytest.raises(NonFiniteError, match=rf"{clip_id} at sigma 0\.\d+"):
        train(config(cache, tmp_path, max_steps=2, save_steps=1, validation={"every": 1}))
    assert run_folder.newest_checkpoint(tmp_path).name == "step-000001"
    assert rows(tmp_path) == []


def stop_in_step(monkeypatch, number):
    """Send SIGTERM to this process while it computes a step."""
    original, calls = loop._losses, []

    def losses(*arguments):
        calls.append(0)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(loop, "_losses", losses)


def test_a_validation_that_a_stop_skipped_is_made_up(cache, tmp_path, monkeypatch):
    """Also the card of a finished run keeps its table, and its best and training losses."""
    settings = {"max_steps": 2, "optimizer": {"schedule": "cosine"}}
    train(config(cache, tmp_path / "whole", **settings))
    whole = rows(tmp_path / "whole")
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        stopped = train(config(cache, run_dir, **settings))
    assert (stopped.exit_code, stopped.steps, rows(run_dir)) == (143, 2, [])
    assert state(run_dir) == "stopped"
    for _ in range(2):
        result = train(config(cache, run_dir, resume=True, **settings))
        assert rows(run_dir) == whole
        assert (result.exit_code, result.best) == (0, whole[0])
        assert state(run_dir) == "finished"
        assert result.validation["mean"] == whole[0]["mean"]
        assert progress(run_dir) == progress(tmp_path / "whole")
        card = (run_dir / "README.md").read_text()
        for name in ("best", "final"):
            assert f"{name} (step 2) | {whole[0]['mean']:.4f}" in card
        metrics = run_folder.read_rows(run_dir, run_folder.METRICS_NAME)
        assert f"| training loss (smoothed) | {metrics[-1]['loss_smoothed']:.4g} |" in card
        assert "..." not in card.split("## Use")[1].split("##")[0]  # a prompt that was trained


def test_a_validation_that_is_not_made_again_stays(cache, tmp_path):
    """Release 0.1.0 did not record in its checkpoints what it had validated."""
    settings = {"max_steps": 1, "validation": {"every": 1}}
    train(config(cache, tmp_path, **settings))
    before = rows(tmp_path)
    state = run_folder.newest_checkpoint(tmp_path) / "state.json"
    old = json.loads(state.read_text())
    del old["progress"]["validated_step"]
    state.write_text(json.dumps(old))
    settings["validation"] = {"every": 0}
    result = train(config(cache, tmp_path, resume=True, **settings))
    assert rows(tmp_path) == before
    assert result.validation == before[0]


def test_a_stop_does_not_wait_for_the_rest_of_a_validation(cache, tmp_path, monkeypatch):
    from wanlora.training import validation

    original, passes = validation.predict, []

    def predict(*arguments):
        passes.append(0)
        if len(passes) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    settings = {"max_steps": 4, "validation": {"every": 2}}
    with monkeypatch.context() as patch:
        patch.setattr(validation, "predict", predict)
        stopped = train(config(cache, tmp_path / "run", **settings))
    assert (stopped.exit_code, stopped.steps, len(passes)) == (143, 2, 3)
    assert run_folder.newest_checkpoint(tmp_path / "run").name == "step-000002"
    assert rows(tmp_path / "run") == []
    train(config(cache, tmp_path / "run", resume=True, **settings))
    train(config(cache, tmp_path / "whole", **settings))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert progress(tmp_path / "run") == progress(tmp_path / "whole")


def test_an_extended_cosine_run_reports_both_learning_rates(cache, tmp_path, caplog):
    settings = {"validation": {"every": 0}, "optimizer": {"schedule": "cosine"}}
    train(config(cache, tmp_path, max_steps=2, **settings))
    train(config(cache, tmp_path, max_steps=2, resume=True, **settings))
    assert "learning rate" not in caplog.text
    train(config(cache, tmp_path, max_steps=4, resume=True, **settings))
    for rate in ("0.0005", "0.0008536"):  # half of the peak; cos(pi / 4) above it
        assert rate in caplog.text


def test_a_run_keeps_its_warmup_when_it_is_extended(cache, tmp_path):
    """As recorded at its start; release 0.1.0 recorded its default, 100."""
    settings = {"validation": {"every": 0}, "optimizer": {"warmup_steps": None}}
    train(config(cache, tmp_path, max_steps=2, **settings))
    path = tmp_path / run_folder.CONFIG_NAME
    assert tomllib.loads(path.read_text())["optimizer"]["warmup_steps"] == 0
    path.write_text(path.read_text().replace("warmup_steps = 0", "warmup_steps = 100"))
    train(config(cache, tmp_path, max_steps=3, resume=True, **settings))
    rates = [row["lr"] for row in run_folder.read_rows(tmp_path, run_folder.METRICS_NAME)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3 * 3 / 101])
    assert tomllib.loads(path.read_text())["optimizer"]["warmup_steps"] == 100
    settings["optimizer"] = {"warmup_steps": 7}
    with pytest.raises(RunError, match=r"optimizer\.warmup_steps: found 100, wanted 7"):
        train(config(cache, tmp_path, max_steps=4, resume=True, **settings))


def test_a_run_of_the_last_release_continues_with_its_defaults_written_out(tmp_path, monkeypatch):
    # Its base is the embedded transformer of that release; a newer release embeds another one.
    monkeypatch.setattr("wanlora.wan.model_folder._micro_folder", lambda: FIXTURE / "model")
    shutil.copytree(FIXTURE, tmp_path / "old")
    old = tmp_path / "old"
    before = (old / "run" / "best" / run_folder.ADAPTER_NAME).read_bytes()
    arguments = (
        "train", "--cache", old / "cache", "--output-dir", old / "run", "--max-steps", 3,
        "--device", "cpu", "--resume", "--set", "lora.rank=1", "--set", "lora.targets=attention",
        "--set", "validation.num_clips=2", "--set", "validation.every=2",
    )  # fmt: skip
    written_out = ("--learning-rate", "0.0001", "--set", "lora.alpha=1", "--model", "micro",
                   "--set", "dtype=float32", "--set", "caption_dropout=0.0")  # fmt: skip
    message = cli.refuses(*arguments, *written_out, "--learning-rate", "0.0002")
    assert "learning_rate: found 0.0001, wanted 0.0002" in message
    done = cli.invoke(*arguments, *written_out)
    assert done.exit_code == 0, done.output
    # Step 2 is measured again, and best/ with it; the old one is kept.
    assert [(row["step"], row["split"]) for row in rows(old / "run")] == [
        (step, split) for step in (2, 3) for split in ("val", "train")
    ]
    assert (
        old / "run" / "best-before-step-000002" / run_folder.ADAPTER_NAME
    ).read_bytes() == before
    assert progress(old / "run")["best_step"] in (2, 3)
    metrics = run_folder.read_rows(old / "run", run_folder.METRICS_NAME)
    assert [row["step"] for row in metrics] == [0, 1, 2]
    recorded = [
        row["mean"] for row in run_folder.read_rows(FIXTURE / "run", run_folder.VALIDATION_NAME)
    ]
    assert [row["mean"] for row in rows(old / "run")[:2]] == pytest.approx(recorded, rel=1e-5)
