"""The folder of a demo: what it refuses, and which steps it does again."""

import json

import pytest

from tests.support import cli
from wanlora import __version__
from wanlora.commands.demo import demo, demo_folder
from wanlora.config import DemoConfig
from wanlora.errors import RunError

RESULT = {
    "concept": "clapping", "base_share": 0.0, "adapter_share": 0.9, "clips": 72,
    "raw_bytes": 15_000_000, "cache_bytes": 800_000, "cached_s": 0.2, "one_stage_s": 2.0,
    "held_out": {"base_mean": 0.8, "mean": 0.4, "difference": -0.4, "ci95": [-0.5, -0.3],
                 "num_clips": 12, "num_groups": 12},
}  # fmt: skip


@pytest.fixture
def steps(monkeypatch):
    """Replace the work of every step by its output; the names of those that ran."""
    ran = []

    def run_step(step, root, lesson):
        ran.append(step)
        for name in demo._outputs(step):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        return RESULT if step == "report" else None

    monkeypatch.setattr(demo, "_run_step", run_step)
    return ran


def test_a_finished_demo_is_shown_and_nothing_is_run(tmp_path, steps):
    first = demo.run(DemoConfig(output_dir=tmp_path))
    assert steps == list(demo.STEPS)
    steps.clear()
    assert demo.run(DemoConfig(output_dir=tmp_path)) == first
    assert steps == []
    assert first.report == str(tmp_path / "report.html")


def test_json_of_a_finished_demo_is_one_document(tmp_path, steps, micro_home):
    first, second = (cli.invoke("demo", "--output-dir", tmp_path / "d", "--json") for _ in range(2))
    assert json.loads(first.stdout) == json.loads(second.stdout)
    assert steps == list(demo.STEPS)


@pytest.mark.parametrize("stopped", demo.STEPS)
def test_a_demo_continues_with_the_step_that_was_interrupted(tmp_path, steps, monkeypatch, stopped):
    do = demo._run_step

    def interrupt(step, *arguments):
        if step == stopped:
            raise KeyboardInterrupt
        return do(step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_run_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.run(DemoConfig(output_dir=tmp_path))
    before = list(steps)
    (tmp_path / "videos").mkdir(exist_ok=True)  # a step leaves something behind
    demo.run(DemoConfig(output_dir=tmp_path))
    assert [*before, stopped] == steps[: len(before) + 1]
    assert steps == list(demo.STEPS)


@pytest.mark.parametrize("step", demo.OUTPUTS)
def test_a_missing_output_is_made_again_with_what_follows(tmp_path, steps, step):
    demo.run(DemoConfig(output_dir=tmp_path))
    steps.clear()
    (tmp_path / demo.OUTPUTS[step]).unlink()
    demo.run(DemoConfig(output_dir=tmp_path))
    assert steps == list(demo.STEPS[demo.STEPS.index(step) :])


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path, steps):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"thesis\.txt.*--output-dir"):
        demo.run(DemoConfig(output_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert steps == []


@pytest.mark.parametrize(
    ("changed", "named"), [({"seed": 1}, "seed"), ({"concept": "striped"}, "concept")]
)
def test_a_demo_of_other_settings_is_refused(tmp_path, steps, changed, named):
    demo.run(DemoConfig(output_dir=tmp_path))
    steps.clear()
    with pytest.raises(RunError, match=named):
        demo.run(DemoConfig(output_dir=tmp_path, **changed))
    assert steps == []


def test_a_demo_of_another_version_is_refused(tmp_path, steps, monkeypatch):
    demo.run(DemoConfig(output_dir=tmp_path))
    monkeypatch.setattr(demo, "__version__", "9.9.9")
    with pytest.raises(RunError, match=f"{__version__}.*9.9.9"):
        demo.run(DemoConfig(output_dir=tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"done": []}'])
def test_a_damaged_record_is_named(tmp_path, steps, text):
    (tmp_path / demo_folder.NAME).write_text(text)
    with pytest.raises(RunError, match=demo_folder.NAME):
        demo.run(DemoConfig(output_dir=tmp_path))


def test_two_demos_do_not_share_a_folder(tmp_path, steps):
    with (
        demo_folder.open_folder(tmp_path, {}),
        pytest.raises(RunError, match="another process"),
        demo_folder.open_folder(tmp_path, {}),
    ):
        pass


def test_training_goes_on_from_a_checkpoint(tmp_path):
    def training():
        (words,) = [
            words for words in demo.commands(tmp_path, max_steps=200, seed=0)
            if words[0] == "train"
        ]  # fmt: skip
        return words

    assert "--resume" not in training()
    step = tmp_path / "run" / "checkpoints" / "step-000050"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    assert "--resume" in training()


def test_the_steps_are_the_commands_between_drawing_and_the_report(tmp_path):
    commands = [words[0] for words in demo.commands(tmp_path, max_steps=200, seed=0)]
    assert commands == list(demo.STEPS[1:-1])
