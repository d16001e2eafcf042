"""`wanlora watch`: the runs of a folder in a browser on this machine."""

from wanlora.commands.watch.watch import WatchResult, run

__all__ = ["WatchResult", "run"]
