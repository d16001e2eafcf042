"""`wanlora run`: run the stages of a job, up to the first one that fails.

Owns: the command of each stage and its result. A stage runs as its own command in its own process:
the printed command does exactly the same, and stage two never imports the encoders. Must not know:
the work of a stage.
"""

import json
import logging
import os
import shlex
from dataclasses import dataclass
from typing import Any

from wanlora.commands.job.job_file import build_stages, read_job
from wanlora.commands.job.process import run_command
from wanlora.commands.job.training_run import changed_settings, finished_steps
from wanlora.config import RunConfig, Settings, TrainConfig, command_line
from wanlora.config.run_settings import recorded_settings
from wanlora.errors import ConfigError
from wanlora.processes.ranks import rank_of
from wanlora.runs import run_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """Result of a stage.

    Attributes:
        command: Its command.
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
    """Results of the stages of a job, in their order."""

    stages: list[StageResult]

    @property
    def exit_code(self) -> int:
        """Exit code of the stage that failed; 0 without one."""
        return self.stages[-1].exit_code or 0

    def lines(self) -> list[str]:
        """List the commands of a dry run, or the state of each stage."""
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
    stages = build_stages(read_job(config.job, config.sets))
    if config.dry_run:
        return JobResult([StageResult(_command(*stage), "planned") for stage in stages.items()])
    results: list[StageResult] = []
    for name, settings in stages.items():
        results.append(_run_stage(name, settings, as_json=config.as_json))
        if results[-1].state == "failed":
            break
    return JobResult(results)


def _run_stage(name: str, settings: Settings, *, as_json: bool) -> StageResult:
    """Run a stage's command, except a training run that is complete."""
    if isinstance(settings, TrainConfig):
        steps = finished_steps(
            settings.output_dir, recorded_settings(settings), cache=settings.cache,
            view=settings.view, patience=settings.validation.patience,
        )  # fmt: skip
        if steps:
            logger.info("\n%s holds the finished run, %d steps", settings.output_dir, steps)
            return StageResult(_line(name, settings), "skipped")
    line = _command(name, settings)
    logger.info("\n$ %s", line)
    words = [*shlex.split(line)[1:], *(["--json"] if as_json else [])]
    exit_code, text = run_command(words, captured=as_json)
    result = json.loads(text) if text.strip() else None
    return StageResult(line, "failed" if exit_code else "done", exit_code, result)


def _command(name: str, settings: Settings) -> str:
    """Write the command of a stage; a training run with a checkpoint is continued."""
    if not isinstance(settings, TrainConfig) or not run_folder.newest_checkpoint(
        settings.output_dir
    ):
        return _line(name, settings)
    options = changed_settings(settings.output_dir, recorded_settings(settings))
    line = _line(name, settings.model_copy(update={"resume": True}))
    return shlex.join([*shlex.split(line), *options])


def _line(name: str, settings: Settings) -> str:
    return command_line(name, settings, absolute=False)
