"""Settings of `wanlora watch`."""

from pathlib import Path

from wanlora.config.settings import Settings, setting


class WatchConfig(Settings):
    """Show the runs of a folder in a browser: a list, a page per run, and runs side by side.

    Only reads files, and serves only this machine (127.0.0.1).
    """

    folder: Path = setting(
        Path("outputs"), "Folder with runs, or one run.", flag="Options", argument=True
    )
    port: int | None = setting(
        None,
        "Port on 127.0.0.1; 0 = any free one.",
        ge=0,
        le=65535,
        flag="Options",
        unset="8642 or the next free one",
    )
    open: bool = setting(False, "Open the page in a browser.", flag="Options")
    once: bool = setting(False, "Print the list of runs and stop, like --json.", flag="Options")
