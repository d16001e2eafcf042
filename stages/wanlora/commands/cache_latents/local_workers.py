"""Workers on this machine: a process for each GPU, started and watched by this one.

Owns: the processes, the one bar for all of them, their heartbeats, and the messages when one dies
or hangs. They are ranks like torchrun's: they share only the store, so the others take over the
rows of a lost worker.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.plan import Plan
from wanlora.commands.cache_latents.worker import (
    PROMPTS_WORTH_LOADING,
    CommittedOfPlan,
    Encoded,
    encode_share,
    for_workers,
    merge,
    reconcile,
    require_same_encoders,
    shown_progress,
)
from wanlora.errors import WanloraError, WorkerError
from wanlora.processes.children import pause_since, start_child
from wanlora.processes.ranks import Rank
from wanlora.processes.signals import interrupted_by_signals

POLL_S = 1.0
"""Seconds between two heartbeats of a worker, and between two updates of the bar from the store."""
SILENT_S = 60.0
"""A worker without a heartbeat for this long is frozen: stopped, or in a hanging call."""
LEFTOVER_S = 60.0
"""Once one worker has finished, every row is made; the others have this long to finish too."""
STOP_S = 60.0
"""A worker has this long to publish its encoded rows after a request to stop."""
STOP_SILENT_S = 5.0
"""While stopping, a worker without a heartbeat for this long is not waited for."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Worker:
    """A process, its last signs of life, and its outcome: None while it runs, or if it is lost.

    Attributes:
        num_rows: Rows that it has reported; None before its first heartbeat.
        heard_s: Time of its last heartbeat.
        advanced_s: Time of its last change of `num_rows`.
    """

    rank: Rank
    process: BaseProcess
    pipe: Connection
    outcome: Encoded | WanloraError | None = None
    num_rows: int | None = None
    heard_s: float = field(default_factory=time.monotonic)
    advanced_s: float = field(default_factory=time.monotonic)

    def receive(self) -> bool:
        """Receive the messages of the process; return whether it has ended."""
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if not isinstance(message, int):
                    self.outcome = message
                    return True
                self.heard_s = time.monotonic()
                if message != self.num_rows:
                    self.num_rows, self.advanced_s = message, self.heard_s
        except (EOFError, OSError):
            return True
        return False

    def kill(self) -> None:
        """Kill the process; a stopped one ends too."""
        self.process.kill()
        self.process.join(STOP_SILENT_S)


class _Heart:
    """The heartbeat of a worker: a thread that sends the number of rows done."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._num_rows = 0
        threading.Thread(target=self._beat, daemon=True).start()

    def count(self, rows: int) -> None:
        """Note rows that are done."""
        self._num_rows += rows

    def send(self, message: object) -> None:
        """Send a message between two beats."""
        with self._lock:
            self._pipe.send(message)

    def _beat(self) -> None:
        with suppress(OSError):  # the parent is gone, or this worker has ended
            while True:
                self.send(self._num_rows)
                time.sleep(POLL_S / 2)


def number_for(plan: Plan, *, num_workers: int | None, device: str) -> int:
    """Return the requested number of workers, or one per GPU; not more than there is work for."""
    gpus = torch.cuda.device_count() if device == "auto" else 1
    asked = num_workers or max(1, gpus)
    prompts = len(plan.missing_prompts) // PROMPTS_WORTH_LOADING
    return min(asked, max(1, *map(len, plan.missing_clips.values()), prompts))


def encode(settings: EncodeSettings, plan: Plan, *, num_workers: int, timeout_s: float) -> Encoded:
    """Encode the missing rows in several processes.

    Args:
        settings: The cache, the types and the limits.
        plan: The missing rows.
        num_workers: Number of processes.
        timeout_s: A worker that finishes no row for this many seconds is killed.

    Raises:
        WanloraError: No worker has finished: the error of the first one that stopped with one, or
            a WorkerError if all were killed.
    """
    ranks = [Rank(i, num_workers, i) for i in range(num_workers)]
    workers: list[_Worker] = []
    try:
        for rank in ranks:  # one after the other, so that those that run are known
            workers.append(_start(settings, for_workers(plan), rank))  # noqa: PERF401
        _watch(workers, CommittedOfPlan(settings.cache, plan), timeout_s)
    finally:
        _stop(workers)
    made = [worker.outcome for worker in workers if isinstance(worker.outcome, Encoded)]
    if not made:
        raise next(
            (w.outcome for w in workers if isinstance(w.outcome, WanloraError)),
            WorkerError(
                f"all {num_workers} workers were killed before everything was encoded. The encoded "
                "rows are kept: run the same command again"
            ),
        )
    return reconcile(settings.cache, plan, merge(made, workers=num_workers))


def _start(settings: EncodeSettings, plan: Plan, rank: Rank) -> _Worker:
    return _Worker(rank, *start_child(_serve, settings, plan, rank))


def _serve(pipe: Connection, settings: EncodeSettings, plan: Plan, rank: Rank) -> None:
    """Body of a worker's process: encode the share of a rank, and send the outcome."""
    logging.getLogger("wanlora").setLevel(logging.ERROR)  # the parent logs for all
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives Ctrl-C and sends SIGTERM
    heart = _Heart(pipe)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // rank.world))
    with suppress(KeyboardInterrupt), interrupted_by_signals([signal.SIGTERM]):
        try:
            encoders = require_same_encoders(settings, plan.encoders, local_rank=rank.local)
            outcome: Encoded | WanloraError = encode_share(
                settings, replace(plan, encoders=encoders), rank, shown=False, on_rows=heart.count
            )
        except WanloraError as error:
            outcome = error
        heart.send(outcome)


def _stop_with_parent() -> None:
    """Stop as after Ctrl-C if the parent was killed, so that the GPU becomes free."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    signal.raise_signal(signal.SIGTERM)
    time.sleep(STOP_S)
    os._exit(1)  # the main thread hangs


def _watch(workers: Sequence[_Worker], committed: CommittedOfPlan, timeout_s: float) -> None:
    """Show committed rows until every worker has ended; log those that ended early or hung."""
    running, done = list(workers), 0
    finished_s: float | None = None
    looked_s = time.monotonic()
    with shown_progress(committed.total, "encode", "row", shown=True) as progress:
        while running:
            wait([worker.pipe for worker in running], timeout=POLL_S)
            looked_s = _take_off_pause(running, looked_s)
            for worker in list(running):
                if worker.receive():
                    running.remove(worker)
                    _report_end(worker, num_left=len(running))
                elif why := _hangs(worker, timeout_s, finished_s):
                    running.remove(worker)
                    worker.kill()
                    log.warning("worker %d %s", worker.rank.index, why)
                if finished_s is None and isinstance(worker.outcome, Encoded):
                    finished_s = time.monotonic()
            there = committed.count()
            progress(there - done, f"{len(running)} workers" if running else "")
            done = there


def _take_off_pause(workers: Sequence[_Worker], looked_s: float) -> float:
    """Ignore the time in which this process was paused: its workers were paused with it.

    Returns:
        Time of this look.
    """
    paused_s = pause_since(looked_s)
    for worker in workers:
        worker.heard_s += paused_s
        worker.advanced_s += paused_s
    return time.monotonic()


def _hangs(worker: _Worker, timeout_s: float, finished_s: float | None) -> str | None:
    """Return the reason to stop waiting for a worker; None to keep waiting."""
    now = time.monotonic()
    if worker.num_rows is not None and now - worker.heard_s > SILENT_S:
        return f"was killed: no heartbeat for {SILENT_S:g} s; others take over its work"
    if now - worker.advanced_s > timeout_s:
        return (
            f"was killed: no row for {timeout_s:g} s (worker_timeout_s); others take over its work"
        )
    if finished_s is not None and now - finished_s > LEFTOVER_S:
        return f"was killed: every row is made, and it did not end for {LEFTOVER_S:g} s"
    return None


def _report_end(worker: _Worker, *, num_left: int) -> None:
    """Log the end of a worker, unless it succeeded or its error ends the run."""
    if worker.outcome is None:
        worker.process.join(STOP_S)
        code = worker.process.exitcode or 0
        why = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
    elif isinstance(worker.outcome, Encoded) or not num_left:
        return  # the last one's refusal is the run's
    else:
        why = f"stopped: {worker.outcome}"
    after = "; others take over its work" if num_left else ""
    log.warning("worker %d %s%s", worker.rank.index, why, after)


def _stop(workers: Sequence[_Worker]) -> None:
    """Stop the running workers, which publish their encoded rows; kill those that do not stop.

    Raises:
        KeyboardInterrupt: A second Ctrl-C; everything is killed then.
    """
    running = [worker for worker in workers if worker.process.is_alive()]
    for worker in running:
        if worker.outcome is None:
            worker.process.terminate()
    deadline = time.monotonic() + STOP_S
    try:
        while running and time.monotonic() < deadline:
            wait([worker.process.sentinel for worker in running], timeout=POLL_S / 2)
            for worker in list(running):
                worker.receive()
                silent = time.monotonic() - worker.heard_s > STOP_SILENT_S
                if not worker.process.is_alive() or (silent and worker.outcome is None):
                    running.remove(worker)
                    _kill(worker)
    finally:
        for worker in running:
            _kill(worker)
        for worker in workers:
            worker.pipe.close()


def _kill(worker: _Worker) -> None:
    if worker.process.is_alive():
        log.warning("worker %d did not stop and was killed", worker.rank.index)
        worker.kill()
