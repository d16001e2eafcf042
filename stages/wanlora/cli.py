"""The command line: flags to config, config to stage, result to text or JSON, errors to exit codes.

Owns: the only `print`. A stage is imported inside its command, so `--help` needs no torch. Flags
come from `options`.
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
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from wanlora import __version__, options
from wanlora.config import COMMANDS, Settings, load
from wanlora.core.out_of_memory import is_out_of_memory, reason_of
from wanlora.errors import ConfigError, WanloraError
from wanlora.files import disk_error
from wanlora.processes.ranks import rank_of
from wanlora.progress import console

STAGES = {
    "demo": "wanlora.commands.demo",
    "prepare": "wanlora.commands.prepare",
    "verify": "wanlora.commands.verify",
    "cache-latents": "wanlora.commands.cache_latents",
    "inspect": "wanlora.commands.inspect.path",
    "estimate": "wanlora.commands.estimate",
    "train": "wanlora.commands.train",
    "watch": "wanlora.commands.watch",
    "sample": "wanlora.commands.sample",
    "evaluate": "wanlora.commands.evaluate",
    "export": "wanlora.commands.export",
    "config": "wanlora.commands.show_config",
    "run": "wanlora.commands.job",
}

HEADINGS = {
    "Start": ("demo", "config", "run"),
    "Data": ("prepare", "verify", "cache-latents", "inspect"),
    "Training": ("estimate", "train", "watch"),
    "Adapter": ("sample", "evaluate", "export"),
}
"""Headings of `wanlora --help`, in the order of the pipeline."""

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
        "wanlora inspect adapter.safetensors --json",
    ],
    "estimate": [
        "wanlora estimate --cache cache/",
        "wanlora estimate --clips 8000 --device h100",
        "wanlora estimate --device rtx4090 --frames 49 --targets attention",
        "wanlora estimate --cache cache/ --probe",
    ],
    "train": [
        "wanlora train --cache cache/ --output-dir outputs/run",
        "wanlora train --cache cache/ --max-steps 50 --gradient-accumulation-steps 4",
        "wanlora train --output-dir outputs/run --resume",
        "wanlora train --output-dir outputs/run --resume --max-steps 2000",
        "wanlora train --cache cache/ --rank 16 --targets attention --lr 2e-4",
    ],
    "watch": [
        "wanlora watch",
        "wanlora watch outputs/ --open",
        "wanlora watch outputs/ --json",
    ],
    "sample": [
        'wanlora sample --adapter outputs/run --prompt "A person clapping their hands"',
        'wanlora sample --prompt "A person walking" --model micro',
        'wanlora sample --adapter outputs/run --prompt "A person sitting" --num-videos 10 '
        "--output-dir outputs/sitting",
        "wanlora sample --adapter outputs/run=0.8 --adapter outputs/style --prompts prompts.txt",
        'wanlora sample --adapter outputs/i2v --image photo.jpg --prompt "The person waves"',
        'wanlora sample --adapter outputs/run --cache cache/ --prompt "A person {activity}" '
        "--num-videos 10 --skip-existing",
    ],
    "evaluate": [
        "wanlora evaluate --adapter outputs/run --cache cache/",
        "wanlora evaluate --adapter outputs/run --checkpoints --videos-per-activity 0 "
        "--output-dir outputs/checkpoints",
        "wanlora evaluate --adapter outputs/a --adapter outputs/b=0.8 --output-dir outputs/a-and-b",
        "wanlora evaluate --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --adapter outputs/high "
        "--adapter outputs/low --videos-per-activity 0",
    ],
    "export": [
        "wanlora export --adapter outputs/run --format comfyui --output person.safetensors",
        "wanlora export --adapter outputs/run --checkpoint best --format peft --output peft/",
        "wanlora export --adapter outputs/run --format merged --output outputs/merged",
        "wanlora export --adapter theirs.safetensors --format diffusers --output ours.safetensors",
        "wanlora export --adapter outputs/high --adapter outputs/low --output person.safetensors",
    ],
    "config": [
        "wanlora config train > train.toml",
        "wanlora train --config train.toml",
        "wanlora config > job.toml",
    ],
    "run": [
        "wanlora run job.toml --dry-run",
        "wanlora run job.toml",
        "wanlora run job.toml --set train.lora.rank=16 --set train.max_steps=500",
    ],
}  # fmt: skip

SHARED = ("cache-latents", "train")
"""Commands that the processes of a launcher run together; others run in each process."""

STARTS_COMMANDS = ("run",)
"""Commands whose child processes print their own progress and results."""

# Errors of paths that a user can fix; disk errors have messages of their own, others a traceback.
FIXABLE_ERRNOS = frozenset(
    {
        errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE,
    }
)  # fmt: skip

# Accepted but not documented: underscores instead of hyphens, and another name of --adapter.
SYNONYMS = {"lora-weights": "adapter"}


def _normalize(option: str) -> str:
    name = option.replace("_", "-")
    return SYNONYMS.get(name, name)


app = typer.Typer(
    name="wanlora",
    cls=options.Group,
    context_settings={
        "token_normalize_func": _normalize,
        "help_option_names": ["--help", "-h"],
    },
    help="LoRA adapters for Wan 2.1 and 2.2. Encode each clip once, then train only the "
    "transformer.\n\n"
    "videos -> prepare -> manifest -> cache-latents -> store -> train -> adapter -> sample -> mp4, "
    "evaluate -> report",
    epilog="Start with: wanlora demo",
    rich_markup_mode="rich",
    no_args_is_help=True,
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
    _reserve_stdout()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # any text can be printed on any terminal
            stream.reconfigure(errors="backslashreplace")
    app()


def _reserve_stdout() -> None:
    """Reserve stdout for results: output of C libraries and child processes goes to stderr."""
    with suppress(OSError, AttributeError):  # a stream may be closed or replaced
        fd = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        sys.stdout = os.fdopen(fd, "w", encoding=sys.stdout.encoding, closefd=False)


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, unless the main thread raises the same error of the disk."""
    if failed.exc_value is None or disk_error(failed.exc_value) is None:
        threading.__excepthook__(failed)


def _add_command(name: str, config_type: type[Settings]) -> None:
    """Add a command for a config model: its docstring, flags, and the common flags."""

    def command(**given: Any) -> None:
        def action() -> int:
            file, sets = given.get("config_file"), given.get("sets") or ()
            if config_type in options.WITHOUT_FILE:  # its --set is a setting of its own
                file, sets = None, ()
            flags = options.values_of(config_type, given)
            return _run(
                name, load(config_type, file=file, sets=sets, flags=flags), given["as_json"]
            )

        raise typer.Exit(_guarded(action))

    parameters = options.parameters(config_type)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = config_type.__doc__
    examples = "\n".join(["[bold yellow]Examples[/]", *(f"  {line}" for line in EXAMPLES[name])])
    heading = next(each for each, names in HEADINGS.items() if name in names)
    kind = options.command_class(config_type)
    app.command(name, cls=kind, epilog=examples, rich_help_panel=heading)(command)


def _run(name: str, config: Settings, as_json: bool) -> int:
    """Run a stage and print its result; of several processes, only rank 0 prints."""
    prints = name not in SHARED or rank_of(os.environ).index == 0
    if as_json and "once" in type(config).model_fields:  # a server has no result to print
        config = config.model_copy(update={"once": True})
    with nullcontext() if name in STARTS_COMMANDS else console():
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain())
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("wanlora").setLevel(logging.INFO if prints else logging.ERROR)
        result = importlib.import_module(STAGES[name]).run(config)
    if not prints:
        if result.exit_code:
            print("\n".join(result.lines()), file=sys.stderr)
        return int(result.exit_code)
    if as_json:
        print(json.dumps(asdict(result), indent=2, default=_jsonable))
    else:
        print("\n".join(result.lines()))
    return int(result.exit_code)


class _Plain(logging.Formatter):
    """Messages with their level in front, except INFO."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _guarded(action: Callable[[], int]) -> int:
    """Turn errors that a user can fix into a message and an exit code; bugs show a traceback."""
    try:
        return action()
    except WanloraError as error:
        print(f"error: {_process_prefix()}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except Exception as error:
        message = _explanation(error)
        if message is None:
            raise
        print(f"error: {_process_prefix()}{message}", file=sys.stderr)
        return 1


def _explanation(error: Exception) -> str | None:
    """Explain a system error that a user can fix; None for a bug."""
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
    if isinstance(error, OSError) and error.errno in FIXABLE_ERRNOS:
        return f"{error.filename}: {error.strerror}; check that path, then run the command again"
    return None


def _process_prefix() -> str:
    """Name this process if a launcher started several, which share one terminal."""
    try:
        rank = rank_of(os.environ)
    except ConfigError:  # reported by the command
        return ""
    return f"process {rank.index} of {rank.world}: " if rank.world > 1 else ""


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} in a result")


for _names in HEADINGS.values():
    for _name in _names:
        if _name in COMMANDS:
            _add_command(_name, COMMANDS[_name])
