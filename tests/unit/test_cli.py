"""What the command line adds to the stages: help, exit codes, and errors of the disk."""

import errno
import os
import signal

import pytest
import typer
from typer.testing import CliRunner

from wanlora import cli, options
from wanlora.config import COMMANDS, load, settings_of
from wanlora.errors import ConfigError, ManifestError


def help_of(*command: str) -> str:
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "400"})
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_every_everyday_flag_with_its_default(name):
    text = help_of(name)
    for setting in settings_of(COMMANDS[name]):
        field = setting.field
        if setting.flag is None:
            continue
        for option in setting.options:
            assert option in text
        assert str(field.description).replace("None = ", "without it: ") in text
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"[default: {field.default}]" in text
    assert "None = " not in text  # nobody types None
    assert "[default: ]" not in text
    assert all(example in text for example in cli.EXAMPLES[name])


def test_the_list_of_commands_says_what_each_is_for_and_where_to_start():
    text = help_of()
    for name, config_type in COMMANDS.items():
        assert name in text
        assert str(config_type.__doc__).splitlines()[0] in text
    assert "Start with: wanlora demo" in text


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
    assert message.startswith("error: out of memory (cuDNN error: CUDNN_STATUS_ALLOC_FAILED)")
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
