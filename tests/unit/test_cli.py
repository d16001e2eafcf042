"""What the command line adds to the stages: help, exit codes, and errors of the disk."""

import errno
import os
import re
import signal

import pytest
import typer
from typer.testing import CliRunner

from wanlora import cli, options
from wanlora.config import COMMANDS, load, settings_of
from wanlora.config.nearest import OTHER_TRAINERS
from wanlora.errors import ConfigError, ManifestError


def help_of(*command: str, width: int = 100) -> str:
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": str(width)})
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_every_everyday_flag_with_its_default(name):
    text = help_of(name)
    words = " ".join(text.split())
    for setting in settings_of(COMMANDS[name]):
        field = setting.field
        if setting.flag is None:
            continue
        for option in setting.options:
            assert (option.upper() if setting.flag.argument else option) in text
        assert " ".join(str(field.description).split()) in words
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"[default: {field.default}]" in words
        if setting.unset:
            assert f"[default: {setting.unset}]" in words
    assert "None" not in words.split()  # it cannot be typed
    assert "[default: ]" not in words
    assert all(example in text for example in cli.EXAMPLES[name])
    assert text == CliRunner().invoke(cli.app, [name, "-h"], env={"COLUMNS": "100"}).output


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_the_terminal_and_cuts_no_name(name, width):
    text = help_of(*([name] if name else []), width=width)
    page = text.partition("\nExamples\n")[0]
    assert max(len(line) for line in page.splitlines()) <= width
    assert "…" not in page
    names = COMMANDS if not name else []
    for setting in settings_of(COMMANDS[name]) if name else ():
        names = [*names, *(() if setting.flag is None else setting.options)]
    for each in names:
        assert re.search(rf"(?<![\w-]){each}(?![\w-])", page, re.IGNORECASE), each


def test_the_list_of_commands_says_what_each_is_for_and_where_to_start():
    text = " ".join(help_of().split())
    for name, config_type in COMMANDS.items():
        assert name in text
        assert str(config_type.__doc__).splitlines()[0] in text
    assert "Start with: wanlora demo" in text


FLAGS = {
    "demo": "--concept --known-videos --max-steps --output-dir --seed",
    "prepare": (
        "--buckets --caption-prefix --captions --count --dry-run --edits --fps --height --html "
        "--materialize --mode --model --num-frames --output --output-dir --scenes --seed "
        "--short --stride --val-fraction --width --workers sources"
    ),
    "verify": "--html --limit --model --source-root manifests",
    "cache-latents": (
        "--cache --device --dry-run --gpus-per-worker --launcher --manifest --model "
        "--num-workers --preview-prompt --source-root --view"
    ),
    "inspect": (
        "--decode --device --dry-run --gc --html --manifest --output-dir --repair --source-root "
        "--verify path"
    ),
    "estimate": (
        "--activations --alpha --batch-by --batch-size --cache --cards --clips --device --eager "
        "--expert --frames --gradient-accumulation-steps --height --memory-gb --model "
        "--num-epochs --num-processes --preview-every --preview-prompt --probe --quantize --rank "
        "--stream-blocks --targets --variant --view --width"
    ),
    "train": (
        "--activations --alpha --batch-by --batch-size --cache --deterministic --device --eager "
        "--expert --gradient-accumulation-steps --init-adapter --keep-checkpoints --learning-rate "
        "--local-copy --lr --manifest --max-steps --model --num-epochs --output-dir "
        "--preview-every --preview-prompt --quantize --rank --resume --save-every-epoch "
        "--save-minutes --save-steps --seed --stream-blocks --targets --view"
    ),
    "watch": "--once --open --port folder",
    "sample": (
        "--adapter --adapter-high --adapter-low --cache --compare --device --fps --guidance-scale "
        "--guidance-scale-low --height --image --latents --model --negative-prompt --num-frames "
        "--num-videos --offload --output --output-dir --overwrite --prompt --prompts --quantize "
        "--seed --shift --skip-existing --steps --stream-blocks --view --width"
    ),
    "evaluate": (
        "--adapter --adapter-high --adapter-low --cache --checkpoints --device --fps "
        "--guidance-scale --guidance-scale-low --height --model --num-clips --num-frames "
        "--output-dir --quantize --seed --steps --stream-blocks --videos-per-activity "
        "--view --width"
    ),
    "export": (
        "--adapter --checkpoint --dtype --expert --format --model --output --overwrite "
        "--private --push"
    ),
    "config": "command",
    "run": "--dry-run --json --set job",
}
"""Flags are a promise to users: a change here is a line in the changelog."""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_flags_of_every_command_are_those_that_users_know(name):
    assert {option for each in settings_of(COMMANDS[name]) for option in each.options} == set(
        FLAGS[name].split()
    )


def test_every_flag_of_a_long_help_page_has_a_heading():
    for name, model in COMMANDS.items():
        flagged = [setting for setting in settings_of(model) if setting.flag]
        if len(flagged) > 8:
            assert sum(each.flag.heading == "Options" for each in flagged) <= 2, name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("wanlora tr", {"train"}),
        ("wanlora train --ra", {"--rank"}),
        ("wanlora train --activations ", {"auto", "none", "selective", "full", "offload"}),
        ("wanlora train --cache ", set()),  # the shell completes paths
    ],
)
def test_the_shell_completes_commands_options_and_choices(words, expected, monkeypatch, capsys):
    monkeypatch.setenv("_WANLORA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    with pytest.raises(SystemExit):
        typer.main.get_command(cli.app).main([], prog_name="wanlora")
    assert set(capsys.readouterr().out.split()) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --lora-rank 4", "--rank"),
        ("train --lora_rank 4", "--rank"),
        ("train --network_dim 4", "--rank"),
        ("train --network_alpha 4", "--alpha"),
        ("train --max_train_steps 4", "--max-steps"),
        ("train --train_batch_size 4", "--batch-size"),
        ("train --num_train_epochs 4", "--num-epochs"),
        ("train --resume_from_checkpoint latest", "--resume"),
        ("train --learning-rat 1", "--learning-rate"),
        ("train --warmup-steps 9", "--set optimizer.warmup_steps=VALUE"),
        ("train --optimizer prodigy", "--set optimizer.name=VALUE"),
        ("train --lr_scheduler cosine", "--set optimizer.schedule=VALUE"),
        ("train --mixed_precision bf16", "--set dtype=VALUE"),
        ("train --ema", "--set ema_decay=VALUE"),
        ("train --captions x.csv", "an option of: prepare."),
        ("cache-latents --batch-size 4", "an option of: estimate, train."),
        ("cache-latents --validation_prompt x", 'validation_prompts=["VALUE"]'),
        ("sample --num_inference_steps 4", "--steps"),
        ("prepare v --train_data_dir x", "SOURCES"),
        ("train --nothing-like-it", "wanlora config train"),
    ],
)
def test_an_unknown_option_names_the_setting_that_does_it(words, expected):
    result = CliRunner().invoke(cli.app, words.split(), env={"COLUMNS": "100"})
    assert result.exit_code == 2
    assert expected in result.output
    option = next(word for word in words.split() if word.startswith("--"))
    assert option.replace("_", "-") in result.output


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("config", "run")])
def test_every_command_answers_an_unknown_option_with_the_command_that_lists_its_settings(name):
    result = CliRunner().invoke(cli.app, [name, "--no-such-thing"], env={"COLUMNS": "100"})
    assert result.exit_code == 2
    assert f"wanlora config {name}" in result.output


def test_names_of_other_trainers_lead_to_settings_that_exist():
    known = {setting.name for model in COMMANDS.values() for setting in settings_of(model)}
    assert set(OTHER_TRAINERS.values()) <= known


def fails_with(error: BaseException) -> int:
    def action() -> int:
        raise error

    return cli._guarded(action)


def test_errors_have_the_exit_codes_that_are_documented(capsys):
    assert fails_with(ManifestError("no clips")) == 1
    assert fails_with(ConfigError("no such setting")) == 2
    assert fails_with(KeyboardInterrupt()) == 130
    assert fails_with(KeyboardInterrupt(signal.SIGTERM)) == 143
    assert capsys.readouterr().err.splitlines() == [
        "error: no clips", "error: no such setting", "interrupted", "interrupted",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_a_message(number, capsys):
    assert fails_with(OSError(number, os.strerror(number), "/data/x.mp4")) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: /data/x.mp4: {os.strerror(number)}; check that path")


def test_a_bug_shows_its_traceback():
    with pytest.raises(FileNotFoundError):
        fails_with(FileNotFoundError(errno.ENOENT, "No such file", "/package/table.json"))
    with pytest.raises(KeyError):
        fails_with(KeyError("x"))


def test_a_command_with_defaults_for_everything_may_be_typed_alone():
    result = CliRunner().invoke(cli.app, ["estimate"])
    assert result.exit_code == 0, result.output


def test_memory_that_runs_out_in_any_command_is_a_message(capsys):
    assert fails_with(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")) == 1
    message = capsys.readouterr().err
    assert re.match(r"error: .*memory \(cuDNN error: CUDNN_STATUS_ALLOC_FAILED\)", message)
    assert "--device" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rank", "8", "--alpha", "16"], {"rank": 8, "alpha": 16.0}),
        (["--targets", "all-linear"], {"targets": "all-linear"}),
        (["--targets", "to_q", "--targets", "to_v"], {"targets": ("to_q", "to_v")}),
        (["--set", "lora.rank=4", "--rank", "8"], {"rank": 8}),
    ],
)
@pytest.mark.parametrize("command", ["train", "estimate"])
def test_flags_of_nested_settings_reach_their_group(command, words, expected):
    config = parsed(command, *words)
    assert {name: getattr(config.lora, name) for name in expected} == expected


def test_lr_is_the_learning_rate():
    config = parsed("train", "--lr", "2e-4", "--seed", "3")
    assert (config.learning_rate, config.seed) == (2e-4, 3)


def parsed(command: str, *words: str):
    """Settings that a command line gives, without running the command."""
    group = typer.main.get_command(cli.app)
    context = group.commands[command].make_context(command, list(words), **group.context_settings)
    sets = context.params["sets"] or ()
    flags = options.values_of(COMMANDS[command], context.params)
    return load(COMMANDS[command], sets=sets, flags=flags)
