"""`config` and `run`: a command's settings as a file, and a whole job in one file."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from wanlora.config.settings import Flag, Settings


class ConfigConfig(Settings):
    """Print the settings of a command, or a job for `wanlora run`, as a commented TOML file."""

    command: Annotated[
        str | None,
        Field(description="A command; None = the everyday settings of a whole job."),
        Flag(argument=True),
    ] = None


class RunConfig(Settings):
    """Run a whole job from one TOML file: prepare, cache-latents, train, sample, evaluate."""

    job: Annotated[
        Path,
        Field(description="Job file; wanlora config prints one to start from."),
        Flag(argument=True, heading="Input and output"),
    ]
    sets: Annotated[
        tuple[str, ...],
        Field(description="STAGE.NAME=VALUE, for example train.lora.rank=16; repeat for several."),
        Flag("--set"),
    ] = ()
    dry_run: Annotated[
        bool, Field(description="Check the file and print the commands, and stop."), Flag()
    ] = False
    as_json: Annotated[bool, Field(description="Print the result as JSON."), Flag("--json")] = False
