import fcntl
import json
import threading

import pytest

from wanlora.errors import ConfigError, NonFiniteError, OutputError, RunError
from wanlora.runs import claim, publish, run_folder


def _publish(run_dir, step, keep=0):
    return publish.publish_checkpoint(
        run_dir, step, lambda folder: (folder / "x").write_text(str(step)) and None, keep=keep
    )


def _run(run_dir, settings, step):
    checkpoint = claim.open_run(run_dir, settings, resume=False)
    with claim.begin_run(run_dir, settings, {}, checkpoint=checkpoint):
        _publish(run_dir, step)


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    _run(tmp_path, {"seed": 0}, 5)
    with pytest.raises(RunError, match=r"already holds a run .*step-000005.*--resume"):
        claim.open_run(tmp_path, {"seed": 0}, resume=False)
    assert claim.open_run(tmp_path, {"seed": 0}, resume=True).name == "step-000005"


def test_a_run_of_other_settings_is_refused_field_by_field(tmp_path):
    _run(tmp_path, {"seed": 0, "lora": {"rank": 4}, "max_steps": 5}, 5)
    with pytest.raises(RunError, match=r"lora\.rank: found 4, wanted 8"):
        claim.open_run(tmp_path, {"seed": 0, "lora": {"rank": 8}, "max_steps": 9}, resume=True)
    longer = {"seed": 0, "lora": {"rank": 4}, "max_steps": 9}
    assert claim.open_run(tmp_path, longer, resume=True)


def test_settings_are_compared_by_value_and_a_newer_setting_has_its_default(tmp_path):
    """Written out or not, recorded or not: a default is a default."""
    defaults = {"seed": 0, "learning_rate": 1e-4, "newer": False}
    _run(tmp_path, {"seed": 0, "learning_rate": None}, 5)

    def resolve(settings):
        return defaults | {key: value for key, value in settings.items() if value is not None}

    def resume(**settings):
        return claim.open_run(tmp_path, settings, resume=True, resolve=resolve)

    assert resume(seed=0, learning_rate=1e-4, newer=False)
    assert resume(seed=0, learning_rate=None, newer=False)
    for changed in ({"newer": True}, {"learning_rate": 2e-4}):
        name, value = next(iter(changed.items()))
        with pytest.raises(RunError, match=rf"{name}: found {defaults[name]}, wanted {value}"):
            resume(seed=0, **changed)


ATTEMPT = {"config.toml": "# wanlora: 0.1.0\nseed = 0\n", "metrics.jsonl": ""}


def _write(folder, names):
    for name, text in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("there", "is_refused"),
    [
        ({}, False),
        ({".gitkeep": "", ".DS_Store": "", "train.log": "", ".lock": ""}, False),
        (ATTEMPT | {"run.html": ""}, False),
        (ATTEMPT | {f"best/{run_folder.ADAPTER_NAME}": ""}, False),  # the same run makes it again
        ({"README.md": "my project"}, True),
        ({"config.toml": "# mine"}, True),
        ({"config.toml": ATTEMPT["config.toml"]}, True),  # a copy for another run
        ({"notes.txt": "", "src/a.py": ""}, True),
        (ATTEMPT | {"README.md": "a finished run"}, True),
        (ATTEMPT | {f"ema/{run_folder.ADAPTER_NAME}": ""}, True),
        ({"config.toml": "# wanlora: 0.1.0\nseed = 1", "metrics.jsonl": "",
          f"best/{run_folder.ADAPTER_NAME}": ""}, True),
        ({f"best/{run_folder.ADAPTER_NAME}": ""}, True),
    ],
)  # fmt: skip
def test_a_folder_with_somebodys_files_is_not_taken_for_a_run(tmp_path, there, is_refused, resume):
    _write(tmp_path, there)
    if not is_refused:
        assert claim.open_run(tmp_path, {"seed": 0}, resume=resume) is None
        return
    with pytest.raises(RunError, match="--output-dir") as raised:
        claim.open_run(tmp_path, {"seed": 0}, resume=resume)
    assert str(tmp_path) in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {name.split("/")[0] for name in there}


def test_comments_in_the_settings_of_a_run_stay_while_the_settings_do(tmp_path):
    _run(tmp_path, {"seed": 0}, 5)
    config = tmp_path / run_folder.CONFIG_NAME
    config.write_text("# the good one\nseed = 0\n")
    checkpoint = run_folder.newest_checkpoint(tmp_path)
    with claim.begin_run(tmp_path, {"seed": 0}, {"wanlora": "1"}, checkpoint=checkpoint):
        assert config.read_text() == "# the good one\nseed = 0\n"
    with claim.begin_run(tmp_path, {"seed": 0, "max_steps": 9}, {}, checkpoint=checkpoint):
        assert "max_steps = 9" in config.read_text()


@pytest.mark.parametrize("resume", [True, False])
def test_an_adapter_without_a_checkpoint_is_never_replaced(tmp_path, resume):
    """Finished runs whose checkpoints were deleted, or stayed on a server."""
    (tmp_path / run_folder.ADAPTER_NAME).write_bytes(b"hours of work")
    with pytest.raises(RunError, match=rf"--init-adapter {tmp_path} --output-dir"):
        claim.open_run(tmp_path, {"seed": 0}, resume=resume)


def test_an_attempt_without_a_checkpoint_leaves_nothing_to_the_next(tmp_path):
    for name in ("best", "ema"):
        (tmp_path / name).mkdir()
        (tmp_path / name / run_folder.ADAPTER_NAME).touch()
    (tmp_path / "ema" / "notes.txt").touch()  # not the run's
    (tmp_path / run_folder.BASE_LOSSES_NAME).touch()
    for _ in range(2):
        publish.remove_attempt(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["ema", "notes.txt"]


def test_checking_a_folder_writes_nothing(tmp_path):
    assert claim.open_run(tmp_path / "new" / "run", {"seed": 0}, resume=False) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_belongs_to_one_process_and_then_to_the_next(tmp_path):
    with claim.begin_run(tmp_path / "run", {"seed": 0}, {}, checkpoint=None):
        with (
            pytest.raises(RunError, match="process is training"),
            claim.begin_run(tmp_path / "run", {"seed": 1}, {}, checkpoint=None),
        ):
            pass
        _publish(tmp_path / "run", 5)
    assert "seed = 0" in (tmp_path / "run" / "config.toml").read_text()
    with (
        pytest.raises(RunError, match="process has trained"),
        claim.begin_run(tmp_path / "run", {"seed": 1}, {}, checkpoint=None),
    ):
        pass
    checkpoint = run_folder.newest_checkpoint(tmp_path / "run")
    with claim.begin_run(tmp_path / "run", {"seed": 1}, {}, checkpoint=checkpoint):
        assert "seed = 1" in (tmp_path / "run" / "config.toml").read_text()


def test_a_start_waits_for_a_process_that_only_looks_at_the_lock(tmp_path):
    (tmp_path / run_folder.LOCK_NAME).touch()
    with (tmp_path / run_folder.LOCK_NAME).open() as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        timer = threading.Timer(0.05, fcntl.flock, (looked_at, fcntl.LOCK_UN))
        timer.start()
        with claim.begin_run(tmp_path, {"seed": 0}, {}, checkpoint=None):
            pass
        timer.join()


@pytest.mark.parametrize("there", [None, [], ["notes.txt"], ["config.toml"]])
def test_a_refused_start_leaves_what_was_there(tmp_path, there):
    folder = tmp_path / "run"
    for name in there or ():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    if there == []:
        folder.mkdir()

    def start():
        with claim.begin_run(folder, {"seed": 0}, {}, checkpoint=None):
            if there is None:
                (folder / "tensorboard").mkdir()
            raise ConfigError("refused")

    with pytest.raises(ConfigError):
        start()
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else None
    assert found == there


def test_a_run_that_has_trained_keeps_its_folder_when_it_fails(tmp_path):
    def start():
        with claim.begin_run(tmp_path / "run", {"seed": 0}, {}, checkpoint=None):
            run_folder.append_row(tmp_path / "run", run_folder.METRICS_NAME, {"step": 0})
            raise NonFiniteError("step 1")

    with pytest.raises(NonFiniteError):
        start()
    assert (tmp_path / "run" / "config.toml").exists()


def test_settings_damaged_by_hand_are_refused_by_name(tmp_path):
    _run(tmp_path, {"seed": 0}, 5)
    (tmp_path / "config.toml").write_text("seed = ")
    with pytest.raises(RunError, match=r"config\.toml is not TOML"):
        claim.open_run(tmp_path, {"seed": 0}, resume=True)


def test_a_file_in_the_way_of_a_run_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file is a file; .*--output-d"):
        claim.open_run(tmp_path / "file" / "run", {}, resume=False)


def test_a_checkpoint_that_fails_while_written_is_not_seen_and_leaves_the_last_one(tmp_path):
    def full_disk(folder):
        (folder / "half").write_text("...")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"step-000001: No space left.* --resume.* step 0"):
        publish.publish_checkpoint(tmp_path, 1, full_disk, keep=0)
    _publish(tmp_path, 1)
    with pytest.raises(OutputError, match=r"step-000002: No space left.*--resume.*step-000001"):
        publish.publish_checkpoint(tmp_path, 2, full_disk, keep=0)
    assert [path.name for path in run_folder.checkpoints(tmp_path)] == ["step-000001"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 1000000):
        _publish(tmp_path, step, keep=2)
    assert [path.name for path in run_folder.checkpoints(tmp_path)] == [
        "step-000003",
        "step-1000000",
    ]


def test_a_checkpoint_that_a_person_set_aside_is_not_seen(tmp_path):
    _publish(tmp_path, 1)
    _publish(tmp_path, 2).rename(tmp_path / "checkpoints" / "step-000002.bad")
    assert run_folder.newest_checkpoint(tmp_path).name == "step-000001"
    _publish(tmp_path, 2, keep=1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000002.bad"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_while_a_checkpoint_is_removed_leaves_no_part_of_one(tmp_path, monkeypatch, step):
    """Replaced by one of the same step (1), or dropped as the oldest (2)."""
    _publish(tmp_path, 1)

    def killed(folder):
        (folder / "x").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publish.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            _publish(tmp_path, step, keep=1)
    assert all((path / "x").exists() for path in run_folder.checkpoints(tmp_path))
    _publish(tmp_path, 3, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_metrics_of_steps_to_be_done_again_and_torn_lines_are_forgotten(tmp_path):
    for step in range(4):
        run_folder.append_row(tmp_path, run_folder.METRICS_NAME, {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    publish.remove_after(tmp_path, 3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


@pytest.mark.parametrize("validated", [True, False])
def test_validations_and_previews_past_a_checkpoint_are_forgotten(tmp_path, validated):
    for step in (2, 4, 6):
        run_folder.append_row(tmp_path, run_folder.VALIDATION_NAME, {"step": step})
        (tmp_path / "previews" / f"step-{step:06d}").mkdir(parents=True)
    (tmp_path / "previews" / "step-000006.kept").mkdir()
    publish.remove_after(tmp_path, 4, validated=validated)
    steps = [row["step"] for row in run_folder.read_rows(tmp_path, run_folder.VALIDATION_NAME)]
    assert steps == ([2, 4] if validated else [2])
    shown = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert shown == ["step-000002", "step-000004", "step-000006.kept"]
