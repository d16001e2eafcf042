import json

import pytest

from wanlora import runs
from wanlora.errors import RunError


def _publish(run_dir, step, keep=0):
    return runs.publish_checkpoint(
        run_dir, step, lambda folder: (folder / "x").write_text(str(step)) and None, keep=keep
    )


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    runs.open_run(tmp_path, {"seed": 0}, resume=False)
    _publish(tmp_path, 5)
    with pytest.raises(RunError, match=r"already holds a run .*step-000005.*--resume"):
        runs.open_run(tmp_path, {"seed": 0}, resume=False)
    assert runs.open_run(tmp_path, {"seed": 0}, resume=True).name == "step-000005"


def test_a_run_of_other_settings_is_refused_field_by_field(tmp_path):
    runs.open_run(tmp_path, {"seed": 0, "lora": {"rank": 4}, "max_steps": 5}, resume=False)
    _publish(tmp_path, 5)
    with pytest.raises(RunError, match=r"lora\.rank: found 4, wanted 8"):
        runs.open_run(tmp_path, {"seed": 0, "lora": {"rank": 8}, "max_steps": 9}, resume=True)
    longer = {"seed": 0, "lora": {"rank": 4}, "max_steps": 9}
    assert runs.open_run(tmp_path, longer, resume=True)


def test_a_checkpoint_that_fails_while_written_is_not_seen_and_leaves_the_last_one(tmp_path):
    _publish(tmp_path, 1)

    def full_disk(folder):
        (folder / "half").write_text("...")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"No space left.*untouched"):
        runs.publish_checkpoint(tmp_path, 2, full_disk, keep=0)
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-000001"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 1000000):
        _publish(tmp_path, step, keep=2)
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step-000003", "step-1000000"]


def test_metrics_of_steps_to_be_done_again_and_torn_lines_are_forgotten(tmp_path):
    for step in range(4):
        runs.append_metrics(tmp_path, {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    runs.truncate_metrics(tmp_path, 3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
