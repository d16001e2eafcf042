"""The command line: flags to config, config to stage, result to text or JSON, errors to exit codes.

Owns: the only `print`. A stage is imported inside its command, so `--help` needs no torch. Flags
are made from the fields of `config` that are marked with `Flag`; nothing is described twice.
"""

import errno
import importlib
import inspect
import io
import json
import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from wanlora import __version__
from wanlora.config import COMMANDS, Flag, Settings, load
from wanlora.core.out_of_memory import is_out_of_memory, reason_of
from wanlora.core.ranks import rank_of
from wanlora.errors import ConfigError, WanloraError
from wanlora.files import disk_error

STAGES = {
    "demo": "wanlora.demo",
    "prepare": "wanlora.prepare",
    "verify": "wanlora.verify",
    "cache-latents": "wanlora.cache_latents",
    "inspect": "wanlora.inspect_path",
    "estimate": "wanlora.estimate",
    "train": "wanlora.train",
    "sample": "wanlora.sample",
    "evaluate": "wanlora.evaluate",
    "export": "wanlora.export",
}

EXAMPLES = {
    "demo": ["wanlora demo", "wanlora demo --output-dir /tmp/demo"],
    "prepare": [
        "wanlora prepare videos/ --output data/processed",
        "wanlora prepare videos/ --captions captions.csv --val-fraction 0.1",
        "wanlora prepare videos/ --dry-run --html plan.html",
        "wanlora prepare videos/ --num-frames 49 --height 480 --width 480 --mode head",
        'wanlora prepare videos/ --buckets --caption-prefix "ohwx dog,"',
    ],
    "verify": [
        "wanlora verify data/processed",
        "wanlora verify data/processed/train.jsonl --limit 5",
        "wanlora verify data/processed --html outputs/clips.html",
    ],
    "cache-latents": [
        "wanlora cache-latents",
        "wanlora cache-latents --manifest data/processed/train.jsonl --dry-run",
        "wanlora cache-latents --model micro --cache cache/",
        "wanlora cache-latents --num-workers 4",
        "wanlora cache-latents --launcher ray --cache s3://bucket/clips",
    ],
    "inspect": [
        "wanlora inspect cache/",
        "wanlora inspect cache/ --verify --json",
        "wanlora inspect cache/ --html outputs/cache.html",
        "wanlora inspect cache/ --repair --manifest data/processed",
        "wanlora inspect cache/ --gc --dry-run",
        "wanlora inspect cache/ --decode walk-1f2e3d4c-000000",
        "wanlora inspect outputs/run",
        "wanlora inspect somebody.safetensors --json",
    ],
    "estimate": [
        "wanlora estimate --cache cache/",
        "wanlora estimate --clips 8000 --device h100",
        "wanlora estimate --device rtx4090 --frames 49 --set lora.targets=attention",
        "wanlora estimate --cache cache/ --probe",
    ],
    "train": [
        "wanlora train --cache cache/ --output-dir outputs/run",
        "wanlora train --cache cache/ --max-steps 50 --gradient-accumulation-steps 4",
        "wanlora train --output-dir outputs/run --resume",
        "wanlora train --output-dir outputs/run --resume --max-steps 2000",
        "wanlora train --cache cache/ --set lora.rank=16 --set lora.targets=attention",
    ],
    "sample": [
        'wanlora sample --adapter outputs/run --prompt "A person clapping their hands"',
        'wanlora sample --prompt "A person walking" --model micro',
        'wanlora sample --adapter outputs/run --prompt "A person sitting" --num-videos 10 '
        "--output-dir outputs/sitting",
        "wanlora sample --adapter outputs/run=0.8 --adapter outputs/style --prompts prompts.txt",
        'wanlora sample --adapter outputs/run --cache cache/ --prompt "A person {activity}" '
        "--num-videos 10 --skip-existing",
    ],
    "evaluate": [
        "wanlora evaluate --adapter outputs/run --cache cache/",
        "wanlora evaluate --adapter outputs/run --checkpoints --videos-per-activity 0",
        "wanlora evaluate --adapter outputs/a --adapter outputs/b=0.8 --output-dir outputs/a-and-b",
    ],
    "export": [
        "wanlora export --adapter outputs/run --format comfyui --output person.safetensors",
        "wanlora export --adapter outputs/run --checkpoint best --format peft --output peft/",
        "wanlora export --adapter outputs/run --format merged --output outputs/merged",
        "wanlora export --adapter theirs.safetensors --format diffusers --output ours.safetensors",
    ],
}  # fmt: skip

SHARED = ("cache-latents", "train")
"""What several processes of a launcher do together; each does any other command for itself."""

# Errors of paths that a user can fix, beside those of the disk; any other shows its traceback.
USERS_TO_MEND = frozenset(
    {
        errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE,
    }
)  # fmt: skip

# Hidden spellings: underscores, as in the scripts this replaces, and their name for --adapter.
SYNONYMS = {"lora-weights": "adapter"}


def _normalize(option: str) -> str:
    name = option.replace("_", "-")
    return SYNONYMS.get(name, name)


class _Command(TyperCommand):
    """A command some of whose options may stand alone (`Flag(bare=...)`)."""

    bare: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType({})
    """Option to the value it stands for alone, and the values that may follow it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = []
        for word, following in zip(args, [*args, ""][1:], strict=True):
            given.append(word)
            alone, values = self.bare.get(word, ("", ()))
            if alone and following not in values:
                given.append(alone)
        return super().parse_args(ctx, given)


app = typer.Typer(
    name="wanlora",
    context_settings={"token_normalize_func": _normalize},
    help="LoRA adapters for Wan 2.1: encode every clip once, train only the DiT ever after.\n\n"
    "videos -> [bold]prepare[/] -> manifest -> [bold]cache-latents[/] -> store -> "
    "[bold]train[/] -> adapter -> [bold]sample[/] -> mp4, [bold]evaluate[/] -> report",
    epilog="Start with: wanlora demo",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)
    ] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line and exit with its code."""
    threading.excepthook = _report_thread
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # any text can be printed on any terminal
            stream.reconfigure(errors="backslashreplace")
    app()


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, unless the main thread raises the same error of the disk."""
    if failed.exc_value is None or disk_error(failed.exc_value) is None:
        threading.__excepthook__(failed)


def _parameter(name: str, annotation: Any, info: Any, default: Any = None) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    if default is ...:
        return inspect.Parameter(name, kind, annotation=Annotated[annotation, info])
    return inspect.Parameter(name, kind, annotation=Annotated[annotation, info], default=default)


_COMMON = [
    _parameter(
        "config_file",
        Path | None,
        typer.Option(
            "--config", metavar="FILE.toml", show_default=False, help="Settings from a TOML file."
        ),
    ),
    _parameter(
        "sets",
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            show_default=False,
            help="Any setting by its dotted name; see docs/configuration.md.",
        ),
    ),
    _parameter(
        "as_json", bool, typer.Option("--json", help="Print the result as JSON."), default=False
    ),
]


def _add_command(name: str, config_type: type[Settings]) -> None:
    """Make a command of a config model: its docstring, flagged fields, and the common flags."""

    def command(**given: Any) -> None:
        file, sets, as_json = (given.pop(key) for key in ("config_file", "sets", "as_json"))
        flags = {key: value for key, value in given.items() if value not in (None, [], False)}
        raise typer.Exit(
            _guarded(
                lambda: _run(
                    name, load(config_type, file=file, sets=sets or (), flags=flags), as_json
                )
            )
        )

    parameters = [*_arguments_and_flags(config_type), *_COMMON]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = config_type.__doc__
    examples = "\n\n".join(["[bold]Examples[/]", *EXAMPLES[name]])
    bare = _bare_options(config_type)
    kind = type("_Command", (_Command,), {"bare": bare}) if bare else None
    app.command(name, cls=kind, epilog=examples)(command)


def _bare_options(config_type: type[Settings]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Options that may stand alone: the value that then counts, and those that may follow."""
    return {
        f"--{name.replace('_', '-')}": (
            flag.bare,
            tuple(_value_kind(field.annotation)[0].split("|")),
        )
        for name, field in config_type.model_fields.items()
        for flag in field.metadata
        if isinstance(flag, Flag) and flag.bare
    }


def _arguments_and_flags(config_type: type[Settings]) -> list[inspect.Parameter]:
    parameters = []
    for name, field in config_type.model_fields.items():
        flag = next((item for item in field.metadata if isinstance(item, Flag)), None)
        if flag is None:
            continue
        kind, many = _value_kind(field.annotation)
        info: dict[str, Any] = {"help": _help(field), "show_default": False}
        if kind != "FLAG":
            info["metavar"] = kind
        annotation: Any = list[str] | None if many else str | None
        if flag.argument:
            del info["metavar"]  # typer names an argument itself
            if field.is_required():
                annotation = list[str]
                parameters.append(_parameter(name, annotation, typer.Argument(**info), ...))
                continue
            parameters.append(_parameter(name, annotation, typer.Argument(**info)))
            continue
        names = flag.names or (f"--{name.replace('_', '-')}",)
        if kind == "FLAG":
            parameters.append(
                _parameter(name, bool, typer.Option(names[0], help=info["help"]), False)
            )
            continue
        if field.is_required():
            info["help"] += " \\[required]"
        parameters.append(_parameter(name, annotation, typer.Option(*names, **info)))
    return parameters


def _value_kind(annotation: Any) -> tuple[str, bool]:
    """Name a field's type for the help, and say whether it takes several values."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is tuple:
        return _value_kind(get_args(annotation)[0])[0], True
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation))), False
    names = {bool: "FLAG", int: "INT", float: "FLOAT", Path: "PATH"}
    return names.get(annotation, "TEXT"), False


def _help(field: FieldInfo) -> str:
    """Describe a setting, with its default: typer's own would be the absence of the flag."""
    # A bracket would be taken for markup.
    text = str(field.description).replace("None = ", "without it: ").replace("[", "\\[")
    default = field.default
    if field.is_required() or default is None or default is False or default in ((), ""):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} \\[default: {shown}]"


def _run(name: str, config: Settings, as_json: bool) -> int:
    """Run a stage and print what it returns; of several processes, the first one speaks."""
    speaks = name not in SHARED or rank_of(os.environ).index == 0
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("wanlora").setLevel(logging.INFO if speaks else logging.ERROR)
    stage = importlib.import_module(STAGES[name])
    result = stage.run(config)
    if not speaks:
        if result.exit_code:
            print("\n".join(result.lines()), file=sys.stderr)
        return int(result.exit_code)
    if as_json:
        print(json.dumps(asdict(result), indent=2, default=_jsonable))
    else:
        print("\n".join(result.lines()))
    return int(result.exit_code)


class _Plain(logging.Formatter):
    """Notes as they are; warnings and worse by their name."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _guarded(action: Callable[[], int]) -> int:
    """Turn what a user can cause into a message and an exit code; let a bug show its traceback."""
    try:
        return action()
    except WanloraError as error:
        print(f"error: {_speaker()}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except Exception as error:
        message = _explanation(error)
        if message is None:
            raise
        print(f"error: {_speaker()}{message}", file=sys.stderr)
        return 1


def _explanation(error: Exception) -> str | None:
    """Explain an error of the machine that a user can fix; None for a bug."""
    if is_out_of_memory(error):
        return (
            f"out of memory ({reason_of(error)}); stop other programs that use this memory, or "
            "choose another --device or smaller settings"
        )
    if reason := disk_error(error):
        named = error.filename if isinstance(error, OSError) else None
        return (
            f"{named or 'disk'}: {reason}; check that path, its permissions and the disk's free "
            "space, then run the command again"
        )
    if isinstance(error, OSError) and error.errno in USERS_TO_MEND:
        return f"{error.filename}: {error.strerror}; check that path, then run the command again"
    return None


def _speaker() -> str:
    """Name this process where a launcher started several, all writing to one terminal."""
    try:
        rank = rank_of(os.environ)
    except ConfigError:  # says so itself
        return ""
    return f"process {rank.index} of {rank.world}: " if rank.world > 1 else ""


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} in a result")


for _name, _config_type in COMMANDS.items():
    _add_command(_name, _config_type)
