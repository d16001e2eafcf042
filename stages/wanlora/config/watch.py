"""Settings of `wanlora watch`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from wanlora.config.settings import Flag, Settings


class WatchConfig(Settings):
    """Show the runs of a folder in a browser: a list, each run's page, and runs side by side.

    Reads only, and answers only this machine (127.0.0.1).
    """

    folder: Annotated[
        Path, Field(description="Folder with runs, or one run."), Flag(argument=True)
    ] = Path("outputs")
    port: Annotated[
        int | None,
        Field(
            description="Port on 127.0.0.1; 0 = any free port; None = 8642, or the next free port.",
            ge=0,
            le=65535,
        ),
        Flag(),
    ] = None
    open: Annotated[bool, Field(description="Open the page in a browser."), Flag()] = False
    once: Annotated[
        bool,
        Field(description="Print the list of runs and stop; --json alone does the same."),
        Flag(),
    ] = False
