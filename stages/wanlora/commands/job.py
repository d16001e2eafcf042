"""`wanlora run`: a whole job from one TOML file.

Owns: which stages run, in which order, and the paths that they share. A stage runs as its own
command in its own process: the printed command does exactly the same, and stage two never meets the
encoders. Must not know: what a stage does.
"""

import difflib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wanlora.commands.show_config import JOB
from wanlora.config import ACTIVITY, COMMANDS, RunConfig, Settings, TrainConfig, command_line
from wanlora.config.describe import as_toml
from wanlora.config.load import assign, build, read_toml
from wanlora.config.run_settings import from_recorded, recorded_settings
from wanlora.config.template import DECIDED
from wanlora.core.fingerprint import flatten
from wanlora.errors import ConfigError
from wanlora.processes.ranks import rank_of
from wanlora.processes.signals import stop_on_signals
from wanlora.runs import run_folder, same_settings
from wanlora.store.views import read_view

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """Outcome of a stage.

    Attributes:
        state: planned, done, skipped or failed.
        exit_code: Exit code of the command; None if it did not run.
        result: Result that the command printed, with `--json` only.
    """

    command: str
    state: str
    exit_code: int | None = None
    result: Any = None


@dataclass(frozen=True)
class JobResult:
    """Outcomes of the stages of a job, in their order."""

    stages: list[StageResult]

    @property
    def exit_code(self) -> int:
        """Exit code of the stage that failed; 0 without one."""
        return self.stages[-1].exit_code or 0

    def lines(self) -> list[str]:
        """List the commands of a dry run, or what happened to each stage."""
        if all(stage.state == "planned" for stage in self.stages):
            return [stage.command for stage in self.stages]
        return ["", *(f"{stage.state:<8} {stage.command}" for stage in self.stages)]


def run(config: RunConfig) -> JobResult:
    """Check a job, then run its stages up to the first one that fails.

    Raises:
        ConfigError: The file, a table or a setting is wrong.
        KeyboardInterrupt: The job was stopped by a signal.
    """
    if rank_of(os.environ).world > 1:
        raise ConfigError(
            "wanlora run starts each stage itself, so start it without a launcher. To train on "
            f"several GPUs, print the commands (wanlora run {config.job} --dry-run) and start "
            "the training command with the launcher"
        )
    planned = plan(read_job(config))
    if config.dry_run:
        return JobResult([StageResult(_command(*stage), "planned") for stage in planned.items()])
    results: list[StageResult] = []
    for name, settings in planned.items():
        results.append(_run_stage(name, settings, as_json=config.as_json))
        if results[-1].state == "failed":
            break
    return JobResult(results)


def read_job(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Read the tables of a job file, in the order of the stages, and apply `--set`.

    Raises:
        ConfigError: The file cannot be read, or has something other than the tables of stages.
    """
    tables: dict[str, dict[str, Any]] = {}
    for key, table in read_toml(config.job.expanduser()).items():
        name = key.replace("_", "-")
        if not isinstance(table, dict):
            raise ConfigError(
                f"{config.job}: {key} is outside of a table; put it under one of {_headers()}"
            )
        if name not in JOB:
            raise ConfigError(f"{config.job}: unknown table [{key}]{_nearest(name)}")
        if name in tables:
            raise ConfigError(f"{config.job} has the table [{name}] twice: keep one of them")
        tables[name] = table
    if not tables:
        raise ConfigError(f"{config.job} has none of the tables {_headers()}")
    for item in config.sets:
        stage, _, rest = item.partition(".")
        name = stage.replace("_", "-")
        if name not in tables or not rest:
            raise ConfigError(
                f"--set {item}: expected STAGE.NAME=VALUE with a table of {config.job}: "
                + ", ".join(tables)
            )
        assign(COMMANDS[name], tables[name], rest)
    return {name: tables[name] for name in JOB if name in tables}


def _headers() -> str:
    return " ".join(f"[{name}]" for name in JOB)


def _nearest(name: str) -> str:
    likely = difflib.get_close_matches(name, JOB, n=1)
    guess = f"; did you mean [{likely[0]}]?" if likely else "."
    return f"{guess} A job has the tables {_headers()}"


def plan(tables: Mapping[str, dict[str, Any]]) -> dict[str, Settings]:
    """Build the settings of each stage. A stage reads what the stages before it write.

    Raises:
        ConfigError: A setting is unknown or out of range, or a stage reads something else.
    """
    stages: dict[str, Settings] = {}
    for name, table in tables.items():
        if decided := sorted(DECIDED.keys() & table.keys()):
            raise ConfigError(f"[{name}] {decided[0]}: leave it out; {DECIDED[decided[0]]}")
        try:
            stages[name] = build(COMMANDS[name], _passed_on(name, table, stages) | table)
        except ConfigError as error:
            raise ConfigError(f"[{name}] {error}") from None
    _require_same_paths(stages)
    return stages


def _passed_on(
    name: str, table: Mapping[str, Any], stages: Mapping[str, Settings]
) -> dict[str, Any]:
    """Return the settings that a stage takes from the stages before it."""
    encoded = stages.get("train") or stages.get("cache-latents")
    values: dict[str, Any] = {}
    if name == "cache-latents" and (prepared := stages.get("prepare")):
        values["manifest"] = [_get(prepared, "output")]
    has_prompts = any(table.get(key) for key in ("prompt", "prompts", "latents"))
    if name == "sample" and has_prompts and ACTIVITY not in str(table.get("prompt")):
        encoded = None  # a cache is for the prompts of its activities
    if name != "cache-latents" and encoded:
        values |= {key: _get(encoded, key) for key in ("cache", "view")}
    if trained := stages.get("train"):
        run_dir = _get(trained, "output_dir")
        if "latents" not in table:
            values["adapter"] = [run_dir]
        if name == "sample" and not table.keys() & {"output", "output_dir"}:
            values["output_dir"] = f"{run_dir}/samples"
        if name == "evaluate":
            values["output_dir"] = f"{run_dir}/evaluation"
    if name == "sample" and not table.keys() & {"overwrite", "latents"}:
        values["skip_existing"] = True
    return values


def _get(settings: Settings, name: str) -> str:
    return str(getattr(settings, name))


def _require_same_paths(stages: Mapping[str, Settings]) -> None:
    """Refuse a stage that does not read what the stages before it write.

    Raises:
        ConfigError: Names both settings.
    """
    for writer, written, reader, read in _READS:
        if writer not in stages or reader not in stages:
            continue
        value, found = _get(stages[writer], written), getattr(stages[reader], read)
        paths = [str(path) for path in (found if isinstance(found, tuple) else [found])]
        if found is not None and not any(path in (value, f"{value}/train.jsonl") for path in paths):
            raise ConfigError(
                f"[{writer}] writes {written} = {value}, but [{reader}] reads {read} = "
                f"{', '.join(paths)}: leave out one of the two settings, or one of the stages"
            )


_READS = (
    ("prepare", "output", "cache-latents", "manifest"),
    ("cache-latents", "cache", "train", "cache"),
    ("cache-latents", "view", "train", "view"),
    ("train", "cache", "sample", "cache"),
    ("train", "cache", "evaluate", "cache"),
)


def _run_stage(name: str, settings: Settings, *, as_json: bool) -> StageResult:
    """Run a stage's command, except a training run that is complete."""
    if isinstance(settings, TrainConfig) and (steps := finished_steps(settings)):
        logger.info("\n%s holds the finished run, %d steps", settings.output_dir, steps)
        return StageResult(_line(name, settings), "skipped")
    line = _command(name, settings)
    logger.info("\n$ %s", line)
    exit_code, text = _run_process([*shlex.split(line)[1:], *(["--json"] if as_json else [])],
                                   captured=as_json)  # fmt: skip
    result = json.loads(text) if text.strip() else None
    return StageResult(line, "failed" if exit_code else "done", exit_code, result)


def _command(name: str, settings: Settings) -> str:
    """Write the command of a stage; a training run with a checkpoint is continued."""
    if not isinstance(settings, TrainConfig) or not run_folder.newest_checkpoint(
        settings.output_dir
    ):
        return _line(name, settings)
    settings = settings.model_copy(update={"resume": True})
    return shlex.join([*shlex.split(_line(name, settings)), *unlike_the_run(settings)])


def unlike_the_run(config: TrainConfig) -> list[str]:
    """Write as options the settings of a file in which it differs from the run that it continues.

    `train --resume` takes the run's own value of a setting that it is not given, and the command
    of a stage leaves out settings at their defaults.

    Raises:
        ConfigError: The run has a value of a setting for which the file has none, and no option
            removes a value.
    """
    recorded = from_recorded(config.output_dir, run_folder.read_settings(config.output_dir))
    theirs, ours = (flatten(recorded_settings(each)) for each in (recorded, config))
    set_by_run = {name for name, value in theirs.items() if value is not None}
    lost = [name for name in sorted(set_by_run - _MAY_BE_LEFT_OUT) if ours.get(name) is None]
    if lost:
        raise ConfigError(
            f"[train] does not set {lost[0]}, and the run in {config.output_dir} has "
            f"{lost[0]} = {as_toml(theirs[lost[0]])}: set it to this value, or choose another "
            "output_dir"
        )
    words = []
    for name, value in ours.items():
        if value is not None and name not in ("output_dir", "resume") and theirs.get(name) != value:
            words += ["--set", f"{name}={as_toml(value)}"]
    if config.max_steps is None and recorded.max_steps is not None:  # else its steps would count
        words += ["--set", f"num_epochs={config.num_epochs}"]
    return words


_MAY_BE_LEFT_OUT = frozenset({"max_steps", "optimizer.warmup_steps"})
"""Settings of a run that its file may lack: num_epochs is given instead, and the run keeps its own
warm-up."""


def finished_steps(config: TrainConfig) -> int | None:
    """Return the steps of a run that is complete with these settings and clips; None otherwise.

    A run that ended by `validation.patience` is complete: `--resume` would train it further.
    Otherwise `train --resume` continues the run, or refuses it by the setting that differs.
    """
    checkpoint = run_folder.newest_checkpoint(config.output_dir)
    status = run_folder.read_status(config.output_dir)
    without_best = run_folder.out_of_patience(config.validation.patience)
    is_over = status.get("state") == "done" or status.get("reason") == without_best
    if checkpoint is None or not is_over:
        return None
    recorded, facts = run_folder.read_config(config.output_dir)
    view = read_view(config.cache, config.view)
    same = same_settings.same_settings(recorded, recorded_settings(config))
    return (
        run_folder.step_of(checkpoint) if same and facts.get("view_sha256") == view.sha256 else None
    )


def _line(name: str, settings: Settings) -> str:
    return command_line(name, settings, absolute=False)


def _run_process(words: list[str], *, captured: bool) -> tuple[int, str]:
    """Run a command of this package; return its exit code and its output if it is captured.

    A terminal sends Ctrl-C to the command as well, which then stops in its own way. SIGTERM is
    passed on.

    Raises:
        KeyboardInterrupt: This process received a signal meanwhile.
    """
    command: subprocess.Popen[str] | None = None

    def pass_on(received: signal.Signals) -> None:
        if command is not None and received == signal.SIGTERM:
            command.send_signal(received)

    text = None
    with stop_on_signals(pass_on) as stop:
        command = subprocess.Popen(  # noqa: S603  (our own command)
            [sys.executable, "-m", "wanlora", *words],
            stdout=subprocess.PIPE if captured else _stdout(), text=True,
        )  # fmt: skip
        if stop.signal is not None:  # it came while the command was started
            pass_on(stop.signal)
        while text is None:
            with suppress(KeyboardInterrupt):  # a second Ctrl-C, which the command received too
                text = command.communicate()[0] or ""
    if stop.signal is not None:
        raise KeyboardInterrupt(stop.signal)
    return command.returncode if command.returncode >= 0 else 128 - command.returncode, text


def _stdout() -> int | None:
    """Return the descriptor of this program's results; its descriptor 1 is for other output."""
    try:
        return sys.stdout.fileno()
    except OSError:  # replaced by a stream without one
        return None
