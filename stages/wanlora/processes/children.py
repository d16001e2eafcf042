"""Child processes that send messages to this one.

Owns: their start, and the pauses of this process, during which they send nothing either. Imports no
torch: children must start quickly.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

PAUSE_S = 5.0
"""Maximum seconds between two checks; a longer time means that this process was paused (Ctrl-Z, a
paused container)."""


def start_child(body: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
    """Start a process, which ends with this one, and return it with this end of its pipe.

    Args:
        body: Called in the new process with its end of the pipe and the arguments; importable.
        arguments: Picklable values.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=body, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def pause_since(looked_s: float) -> float:
    """Return how long this process was stopped since its last look, in seconds; usually 0.

    Its children were stopped with it, so the pause does not count as their silence.

    Args:
        looked_s: Time of the last look, by the monotonic clock.
    """
    elapsed_s = time.monotonic() - looked_s
    return elapsed_s if elapsed_s > PAUSE_S else 0.0
