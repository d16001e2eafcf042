"""Settings of a run that is continued."""

from pathlib import Path

import pytest
import tomli_w

from wanlora.commands.job.training_run import changed_settings
from wanlora.config import TrainConfig, load
from wanlora.config.run_settings import from_recorded, recorded_settings, with_recorded
from wanlora.errors import ConfigError, RunError
from wanlora.runs import claim, publish


def _record(config: TrainConfig) -> TrainConfig:
    """Leave what a run with these settings leaves, with one checkpoint and its cache."""
    if isinstance(config.cache, Path):
        config.cache.mkdir(parents=True, exist_ok=True)
    with claim.begin_run(
        config.output_dir, recorded_settings(config), {"wanlora": "0.1.0"}, checkpoint=None
    ):
        publish.publish_checkpoint(config.output_dir, 5, lambda folder: None, keep=0)
    return config


def _resume(run_dir: Path, **given) -> TrainConfig:
    return with_recorded(TrainConfig(output_dir=run_dir, resume=True, **given))


def test_a_run_continues_with_its_own_settings_and_those_given_as_well(tmp_path):
    ours = _record(
        TrainConfig(
            output_dir=tmp_path / "run", cache=tmp_path / "latents", model="micro", max_steps=50,
            learning_rate=3e-4, clip_weights={"walk": 2.0, "sit": 3.0},
            lora={"rank": 8, "targets": ["to_q", "to_k"]}, optimizer={"warmup_steps": 7},
        )
    )  # fmt: skip
    assert _resume(tmp_path / "run") == ours.model_copy(update={"resume": True})
    more = _resume(tmp_path / "run", max_steps=90, lora={"rank": 9}, clip_weights={"walk": 4.0})
    assert (more.max_steps, more.lora.rank, more.lora.targets) == (90, 9, ("to_q", "to_k"))
    assert more.clip_weights == {"walk": 4.0}
    assert more.optimizer.warmup_steps == 7
    epochs = _resume(tmp_path / "run", num_epochs=3)
    assert (epochs.num_epochs, epochs.max_steps) == (3, None)  # max_steps would win


def test_paths_are_found_from_another_working_directory(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    _record(TrainConfig(output_dir="outputs/run", cache="cache", local_copy="scratch"))
    monkeypatch.chdir(tmp_path / "there")
    again = _resume(Path("../outputs/run"))
    assert again.cache == tmp_path / "cache"
    assert again.local_copy == tmp_path / "scratch"


@pytest.mark.parametrize("by_file", [False, True], ids=["short", "with --config"])
def test_a_project_that_was_moved_as_a_whole_continues(tmp_path, monkeypatch, by_file):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "old" / "wan"
    model.mkdir(parents=True)
    _record(
        TrainConfig(output_dir="old/outputs/run", cache="old/cache", model="old/wan",
                    manifest=["old/data/train.jsonl"])
    )  # fmt: skip
    (tmp_path / "old" / "data").mkdir()
    (tmp_path / "old" / "data" / "train.jsonl").touch()
    (tmp_path / "old").rename(tmp_path / "new")
    run_dir = tmp_path / "new" / "outputs" / "run"
    file = run_dir / "config.toml" if by_file else None
    flags = {"output_dir": str(run_dir), "resume": True}
    again = with_recorded(load(TrainConfig, file=file, flags=flags))
    assert again.output_dir == run_dir
    assert again.cache == tmp_path / "new" / "cache"
    assert again.model == str(tmp_path / "new" / "wan")
    assert again.manifest == (tmp_path / "new" / "data" / "train.jsonl",)


def test_relative_paths_of_earlier_releases_are_found_beside_the_run(tmp_path, monkeypatch):
    run_dir = tmp_path / "project" / "outputs" / "run"
    (run_dir / "checkpoints" / "step-000005").mkdir(parents=True)
    (tmp_path / "project" / "cache").mkdir()
    (tmp_path / "cache").mkdir()  # of another project
    settings = {"output_dir": "outputs/run", "cache": "cache"}
    (run_dir / "config.toml").write_text(tomli_w.dumps(settings))
    monkeypatch.chdir(tmp_path)
    assert _resume(Path("project/outputs/run")).cache == tmp_path / "project" / "cache"


def test_a_cache_that_was_moved_alone_is_named_with_its_option(tmp_path):
    _record(TrainConfig(output_dir=tmp_path / "run", cache=tmp_path / "latents"))
    (tmp_path / "latents").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=rf"{tmp_path / 'latents'}.*--resume --cache"):
        _resume(tmp_path / "run")
    assert _resume(tmp_path / "run", cache=tmp_path / "elsewhere").cache.name == "elsewhere"


def test_a_cache_at_a_url_stays_one(tmp_path):
    _record(TrainConfig(output_dir=tmp_path / "run", cache="s3://bucket/clips"))
    assert str(_resume(tmp_path / "run").cache) == "s3://bucket/clips"


def test_a_mistyped_folder_is_refused_and_the_runs_beside_it_are_listed(tmp_path):
    _record(TrainConfig(output_dir=tmp_path / "walking", cache=tmp_path / "c"))
    with pytest.raises(RunError, match=rf"{tmp_path / 'wlaking'} holds no run.*walking"):
        _resume(tmp_path / "wlaking")
    # With settings of its own it starts at step 0: what a scheduler runs again and again.
    assert _resume(tmp_path / "new", max_steps=5) == TrainConfig(
        output_dir=tmp_path / "new", resume=True, max_steps=5
    )


def test_a_setting_that_contradicts_the_runs_own_is_refused(tmp_path):
    _record(TrainConfig(output_dir=tmp_path / "run", cache=tmp_path / "c", lora={"dora": True}))
    with pytest.raises(ConfigError, match=r"eager off.*DoRA(?s:.*)config\.toml"):
        _resume(tmp_path / "run", eager="off")


def test_settings_of_a_newer_release_are_refused(tmp_path):
    _record(TrainConfig(output_dir=tmp_path / "run", cache=tmp_path / "c"))
    with (tmp_path / "run" / "config.toml").open("a") as file:
        file.write("[brand_new]\nx = 1\n")
    with pytest.raises(RunError, match="brand_new"):
        _resume(tmp_path / "run")


def test_a_run_with_a_removed_optimizer_names_what_replaces_it(tmp_path):
    _record(TrainConfig(output_dir=tmp_path / "run", cache=tmp_path / "c"))
    file = tmp_path / "run" / "config.toml"
    file.write_text(file.read_text().replace('"adamw"', '"adamw8bit"'))
    with pytest.raises(
        RunError, match=r"optimizer\.name: adamw8bit.*use adamw(?s:.*)--init-adapter"
    ):
        _resume(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"optimizer\.name: adamw8bit.*use adamw"):
        load(TrainConfig, file=file)


def test_without_resume_nothing_is_read(tmp_path):
    config = TrainConfig(output_dir=tmp_path)
    assert with_recorded(config) is config


def test_settings_that_are_not_set_stay_so(tmp_path):
    config = TrainConfig(output_dir=tmp_path / "run", cache=tmp_path / "c")
    assert from_recorded(tmp_path / "run", recorded_settings(config)) == config


def _changed(config):
    return changed_settings(config.output_dir, recorded_settings(config))


def test_a_file_for_a_whole_job_is_not_overruled_by_the_run_that_it_continues(tmp_path):
    """Also by a setting that was removed from the file, and so has its default."""
    common = {"output_dir": tmp_path / "run", "cache": tmp_path / "c"}
    _record(TrainConfig(**common, max_steps=5, seed=3, lora={"rank": 8}))
    same = TrainConfig(**common, max_steps=5, seed=3, lora={"rank": 8}, resume=True)
    assert _changed(same) == []
    words = _changed(TrainConfig(**common, lora={"alpha": 4}, resume=True))
    assert words[::2] == ["--set"] * 4
    assert set(words[1::2]) == {"seed=0", "lora.rank=32", "lora.alpha=4", "num_epochs=10"}
    sets = words[1::2]
    flags = {"output_dir": str(tmp_path / "run"), "resume": True}
    again = with_recorded(load(TrainConfig, sets=sets, flags=flags))
    assert (again.max_steps, again.seed, again.lora.rank, again.lora.alpha) == (None, 0, 32, 4)


def test_a_job_that_has_no_value_for_a_setting_of_its_run_is_refused(tmp_path):
    """No option removes a value: the run's own would count, against the file."""
    common = {"output_dir": tmp_path / "run", "cache": tmp_path / "c"}
    _record(TrainConfig(**common, learning_rate=3e-4, optimizer={"warmup_steps": 7}))
    with pytest.raises(ConfigError, match=r"learning_rate = 0\.0003"):
        _changed(TrainConfig(**common, resume=True))
    assert _changed(TrainConfig(**common, learning_rate=3e-4, resume=True)) == []


def test_any_text_of_a_job_reaches_the_run_that_it_continues(tmp_path):
    common = {"output_dir": tmp_path / "run", "cache": tmp_path / "c"}
    _record(TrainConfig(**common))
    words = _changed(TrainConfig(**common, previews={"prompts": ['a \U0001f415 "é"']}))
    flags = {"output_dir": str(tmp_path / "run"), "resume": True}
    again = with_recorded(load(TrainConfig, sets=words[1::2], flags=flags))
    assert again.previews.prompts == ('a \U0001f415 "é"',)
