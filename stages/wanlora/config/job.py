"""Settings of `wanlora run`."""

from pathlib import Path
from typing import Annotated

from wanlora.config.settings import Settings, described, setting


class RunConfig(Settings):
    """Run a whole job from one TOML file: prepare, cache-latents, train, sample, evaluate."""

    job: Annotated[
        Path,
        described(
            "Job file; `wanlora config` prints one to start from.",
            flag="Input and output",
            argument=True,
        ),
    ]
    sets: tuple[str, ...] = setting(
        (),
        "STAGE.NAME=VALUE, for example train.lora.rank=16; repeat for several.",
        flag="Options",
        names=("--set",),
    )
    dry_run: bool = setting(False, "Check the file, print the commands, and stop.", flag="Options")
    as_json: bool = setting(False, "Print the result as JSON.", flag="Options", names=("--json",))
