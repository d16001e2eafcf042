"""A whole job in one file: its stages, their order and paths; and the files to start from."""

import contextlib
import json
import os
import re
import shlex
import signal
import threading
import tomllib

import pytest

from tests.support import cli
from tests.unit.test_cli import parsed
from wanlora.commands.job import job, process, training_run
from wanlora.commands.job.job_file import build_stages, read_job
from wanlora.commands.show_config import JOB
from wanlora.config import COMMANDS, RunConfig, TrainConfig, settings_of
from wanlora.config.load import build, command_line
from wanlora.errors import ConfigError
from wanlora.runs import claim, run_folder

ALL = """
[prepare]
sources = ["videos"]
[cache-latents]
[train]
[sample]
[evaluate]
"""


def commands(tmp_path, text: str, *sets: str) -> list[str]:
    """Commands of a job, as a dry run prints them."""
    file = tmp_path / "job.toml"
    file.write_text(text)
    with contextlib.chdir(tmp_path):
        return job.run(RunConfig(job=file, sets=sets, dry_run=True)).lines()


def refusal(tmp_path, text: str, *sets: str) -> str:
    with pytest.raises(ConfigError) as error:
        commands(tmp_path, text, *sets)
    return str(error.value)


def test_a_stage_reads_what_the_stages_before_it_wrote(tmp_path):
    given = ALL.replace("[cache-latents]", 'output = "d"\n[cache-latents]\ncache = "c"\nview = "v"')
    given = given.replace("[train]", '[train]\noutput_dir = "r"\nlora.rank = 4')
    prepare, encode, train, sample, evaluate = map(shlex.split, commands(tmp_path, given))
    assert prepare == ["wanlora", "prepare", "videos", "--output", "d"]
    assert encode == ["wanlora", "cache-latents", "--manifest", "d", "--cache", "c", "--view", "v"]
    assert train == [
        "wanlora",
        "train",
        "--cache",
        "c",
        "--output-dir",
        "r",
        "--view",
        "v",
        "--rank",
        "4",
    ]
    assert {"--adapter", "r", "--cache", "c", "r/samples", "--skip-existing"} <= set(sample)
    assert {"--adapter", "r", "--cache", "c", "r/evaluation"} <= set(evaluate)


def test_every_printed_command_gives_the_settings_of_the_job(tmp_path):
    text = ALL.replace("[sample]", '[sample]\nprompt = ["it\'s a \\"dog\\"", "42"]\nseed = 3')
    text += '[train.lora]\ntargets = ["to_q"]\n'  # a text would be a regex
    text += "[train.optimizer]\nwarmup_steps = 3\n[train.clip_weights]\n'a b' = 2.0\n"
    text += "[cache-latents.store]\nlatent_mantissa_bits = 7\n"
    file = tmp_path / "job.toml"
    file.write_text(text)
    planned = build_stages(read_job(file))
    for name, settings in planned.items():
        words = shlex.split(command_line(name, settings, absolute=False))
        assert parsed(*words[1:]) == settings


def test_a_job_may_have_some_of_the_stages_and_set_changes_one(tmp_path):
    text = "[train]\n[evaluate]\n"
    sets = ("train.lora.rank=16", "train.max_steps=5", "evaluate.split=train")
    train, evaluate = commands(tmp_path, text, *sets)
    assert train == "wanlora train --max-steps 5 --rank 16"
    assert "--adapter outputs/run" in evaluate
    assert "--set split=train" in evaluate


def test_prompts_of_a_job_need_no_cache(tmp_path):
    with_prompt = commands(tmp_path, '[train]\ncache = "c"\n[sample]\nprompt = ["a dog"]\n')[1]
    assert "--cache" not in with_prompt
    per_activity = commands(
        tmp_path, '[train]\ncache = "c"\n[sample]\nprompt = ["a {activity}"]\n'
    )[1]
    assert "--cache c" in per_activity


@pytest.mark.parametrize(
    ("text", "sets", "expected"),
    [
        ("[trian]\n", (), ["[trian]", "did you mean [train]?"]),
        ("[export]\n", (), ["[export]", "[evaluate]"]),
        ("seed = 3\n", (), ["seed is outside of a table"]),
        ("", (), ["none of the tables"]),
        ("[cache-latents]\n[cache_latents]\nview = 'v'\n", (), ["[cache-latents] twice"]),
        ("[train]\nlr = 1e-4\n", (), ["[train]", "unknown setting lr"]),
        ("[train.lora]\nrnak = 4\n", (), ["[train]", "lora.rnak", "did you mean lora.rank"]),
        ("[train]\nmax_steps = 0\n", (), ["[train]", "max_steps", "found 0"]),
        ("[train]\nresume = true\n", (), ["[train]", "resume"]),
        ("[prepare]\nsources = ['v']\ndry_run = true\n", (), ["dry_run", "--dry-run"]),
        ("[prepare]\n", (), ["[prepare]", "SOURCES is required"]),
        ("[evaluate]\n", (), ["[evaluate]", "--adapter is required"]),
        ("[sample]\n", (), ["[sample]", "nothing to sample"]),
        (
            "[cache-latents]\ncache = 'a'\n[train]\ncache = 'b'\n", (),
            ["[cache-latents] writes cache = a", "[train] reads cache = b"],
        ),
        (
            "[prepare]\nsources = ['v']\n[cache-latents]\nmanifest = ['other']\n", (),
            ["writes output = data/processed", "reads manifest = other"],
        ),
        ("[train]\n", ("max_steps=4",), ["--set max_steps=4", "STAGE.NAME=VALUE"]),
        ("[train]\n", ("sample.seed=4",), ["--set sample.seed=4", "train"]),
    ],
)  # fmt: skip
def test_a_wrong_job_is_refused_by_name_before_anything_runs(tmp_path, text, sets, expected):
    message = refusal(tmp_path, text, *sets)
    assert all(part in message for part in expected), message


@pytest.fixture
def processes(monkeypatch):
    """Record the commands that a job starts instead of starting them; exit codes by stage."""
    started, exit_codes = [], {}

    def run_process(words, *, captured):
        started.append(words)
        return exit_codes.get(words[0], 0), json.dumps({"of": words[0]}) if captured else ""

    monkeypatch.setattr(job, "run_command", run_process)
    return started, exit_codes


def test_a_job_stops_at_the_first_stage_that_fails_with_its_exit_code(tmp_path, processes):
    started, exit_codes = processes
    exit_codes["cache-latents"] = 3
    file = tmp_path / "job.toml"
    file.write_text(ALL)
    result = job.run(RunConfig(job=file))
    assert [words[0] for words in started] == ["prepare", "cache-latents"]
    assert result.exit_code == 3
    assert [stage.state for stage in result.stages] == ["done", "failed"]


def test_the_json_of_a_job_holds_the_results_of_its_stages(tmp_path, processes):
    file = tmp_path / "job.toml"
    file.write_text(ALL)
    document = json.loads(cli.invoke("run", file, "--json").stdout)
    assert [stage["result"]["of"] for stage in document["stages"]] == list(JOB)
    assert all(words[-1] == "--json" for words in processes[0])


def write_run(folder, config: TrainConfig, *, state: str, view_sha256: str) -> None:
    (folder / "checkpoints" / "step-000004").mkdir(parents=True)
    reason = run_folder.out_of_patience(3) if state == "without a new best" else None
    status = {"state": "stopped" if reason else state, "reason": reason}
    (folder / run_folder.STATUS_NAME).write_text(json.dumps(status))
    settings = config.model_dump(mode="json") | {"output_dir": "elsewhere"}
    settings["optimizer"]["warmup_steps"] = 1
    with claim.begin_run(folder, settings, {"view_sha256": view_sha256},
                        checkpoint=folder / "checkpoints" / "step-000004"):  # fmt: skip
        pass


@pytest.mark.parametrize(
    ("state", "view", "sets", "expected"),
    [
        ("done", "same", (), None),
        ("done", "same", ("train.save_steps=9",), None),
        ("without a new best", "same", ("train.validation.patience=3",), None),
        ("without a new best", "same", ("train.validation.patience=9",), "--resume"),
        ("stopped", "same", (), "--resume"),
        ("done", "other", (), "--resume"),
        ("done", "same", ("train.max_steps=8",), "--resume"),
        ("done", "same", ("train.lora.rank=8",), "--resume"),
    ],
)
def test_a_complete_run_is_not_trained_again_and_any_other_is_continued(
    tmp_path, processes, monkeypatch, state, view, sets, expected
):
    class Stored:
        sha256 = "same"

    monkeypatch.setattr(training_run, "read_view", lambda _cache, _view: Stored)
    run_dir = tmp_path / "run"
    table = {"output_dir": str(run_dir), "max_steps": 4}
    write_run(run_dir, build(TrainConfig, table), state=state, view_sha256=view)
    file = tmp_path / "job.toml"
    file.write_text(f'[train]\noutput_dir = "{run_dir}"\nmax_steps = 4\n')
    result = job.run(RunConfig(job=file, sets=sets))
    assert result.exit_code == 0
    if expected is None:
        assert (processes[0], result.stages[0].state) == ([], "skipped")
    else:
        assert expected in processes[0][0]


def test_a_dry_run_prints_the_command_that_continues_a_run(tmp_path):
    run_dir = tmp_path / "outputs" / "run"
    table = {"output_dir": str(run_dir), "max_steps": 4}
    write_run(run_dir, build(TrainConfig, table), state="stopped", view_sha256="same")
    (train,) = commands(tmp_path, "[train]\nmax_steps = 8\n")
    assert train.startswith("wanlora train --max-steps 8 --resume")


def test_a_new_run_is_not_resumed(tmp_path, processes):
    file = tmp_path / "job.toml"
    file.write_text(f'[train]\noutput_dir = "{tmp_path / "run"}"\n')
    job.run(RunConfig(job=file))
    assert "--resume" not in processes[0][0]


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_stage_in_its_own_way_and_then_the_job(tmp_path, monkeypatch, received):
    program = tmp_path / "program"
    program.write_text(
        "#!/bin/sh\ntrap 'sleep 0.3; echo saved; exit 143' TERM\n"
        f"echo started > {tmp_path}/started\n"
        + ("sleep 0.5\necho saved\n" if received == signal.SIGINT else "sleep 20 & wait\n")
    )
    program.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(program))

    def send() -> None:
        while not (tmp_path / "started").exists():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), received)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(KeyboardInterrupt) as stopped:
        process.run_command(["train"], captured=True)
    sender.join()
    assert stopped.value.args == (received,)


def test_a_job_under_a_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--dry-run" in refusal(tmp_path, ALL)


def uncommented(text: str) -> str:
    """Remove the # before every setting that has a value."""
    return re.sub(r"^#(\w+ = (?!\.\.\.$))", r"\1", text, flags=re.MULTILINE)


ALONE = {
    "prepare": {"sources": ["videos"]},
    "sample": {"prompt": ["a dog"]},
    "evaluate": {"adapter": ["run"]},
    "export": {"adapter": "run", "output": "x.safetensors"},
}
"""Settings without which a command is refused."""


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("config", "run")])
def test_the_printed_settings_of_a_command_are_its_defaults(name):
    text = cli.invoke("config", name).output
    wanted = build(COMMANDS[name], ALONE.get(name, {}))
    as_printed = tomllib.loads(text)
    assert not any(as_printed.values())  # empty tables: everything is commented out
    assert build(COMMANDS[name], as_printed | ALONE.get(name, {})) == wanted
    table = tomllib.loads(uncommented(text)) | ALONE.get(name, {})
    if name == "cache-latents":
        assert table["launcher"] == "local"
    assert build(COMMANDS[name], table) == wanted
    for setting in settings_of(COMMANDS[name]):
        assert re.search(rf"^#{setting.name.rpartition('.')[2]} = ", text, re.MULTILINE)


def test_the_printed_job_runs_all_stages_with_their_defaults(tmp_path):
    text = cli.invoke("config").output
    assert commands(tmp_path, text) == commands(tmp_path, ALL)
    assert list(tomllib.loads(text)) == list(JOB)
    assert commands(tmp_path, uncommented(text))  # every setting that is shown is one of a job
    assert cli.invoke("config", "run").output == text


def test_the_settings_of_an_unknown_command_are_refused_with_the_nearest():
    assert "train?" in cli.refuses("config", "trian", exit_code=2)
