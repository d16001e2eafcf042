"""`wanlora config`: the settings of a command, or a job file, to start from.

Owns: which command is meant. The text is made in `config.template`.
"""

import difflib

from wanlora.config import COMMANDS, ConfigConfig
from wanlora.config.template import TemplateResult, job_file, settings_file
from wanlora.errors import ConfigError

JOB = ("prepare", "cache-latents", "train", "sample", "evaluate")
"""Stages of a job, in the order in which they run."""


def run(config: ConfigConfig) -> TemplateResult:
    """Write the file.

    Raises:
        ConfigError: There is no such command.
    """
    name = (config.command or "run").replace("_", "-")
    if name == "run":
        return job_file({stage: COMMANDS[stage] for stage in JOB})
    commands = [command for command in COMMANDS if command != "config"]
    if name not in commands:
        likely = difflib.get_close_matches(name, commands, n=1)
        guess = f"; did you mean {likely[0]}?" if likely else "."
        raise ConfigError(f"no command {name}{guess} There are: {', '.join(commands)}")
    return settings_file(name, COMMANDS[name])
