"""Workers on this machine: a process for each GPU, started and watched by this one.

Owns: the processes, the one bar over all of them, and what is said when one dies. They are ranks
like torchrun's, so nobody hands out work and nobody waits for a dead one.
"""

import logging
import multiprocessing
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from wanlora.cache_latents.plan import Plan
from wanlora.cache_latents.walk import Committed
from wanlora.cache_latents.worker import (
    PROMPTS_WORTH_LOADING,
    Encoded,
    encode_share,
    merged,
    same_encoders,
    settled,
    shown_progress,
)
from wanlora.config import CacheLatentsConfig
from wanlora.core.ranks import Rank
from wanlora.errors import WanloraError, WorkerError
from wanlora.stopping import interrupted_by_signals

POLL_S = 1.0
"""Between two looks at the store, for the bar."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Worker:
    """A process, and how it ended: with what it made, a refusal, or neither when it died."""

    rank: Rank
    process: BaseProcess
    pipe: Connection
    outcome: Encoded | WanloraError | None = None


def how_many(config: CacheLatentsConfig, plan: Plan) -> int:
    """Workers that are asked for, or one a GPU; no more than there is work for."""
    gpus = torch.cuda.device_count() if config.device == "auto" else 1
    asked = config.num_workers or max(1, gpus)
    prompts = len(plan.missing_prompts) // PROMPTS_WORTH_LOADING
    return min(asked, max(1, len(plan.missing_clips), prompts))


def encode(config: CacheLatentsConfig, plan: Plan, *, num_workers: int) -> Encoded:
    """Encode what is missing in so many processes.

    Raises:
        WanloraError: No worker has come to the end; what the first one refused with, or a
            WorkerError where all were killed.
    """
    small = replace(plan, clips=(), failures=(), prompts={})  # what workers need of it
    ranks = [Rank(i, num_workers, i) for i in range(num_workers)]
    workers: list[_Worker] = []
    try:
        for rank in ranks:  # one after the other, so that those that run are known
            workers.append(_start(config, small, rank))  # noqa: PERF401
        _watch(workers, config, plan)
    finally:
        _stop(workers)
    made = [worker.outcome for worker in workers if isinstance(worker.outcome, Encoded)]
    if not made:
        raise next(
            (w.outcome for w in workers if isinstance(w.outcome, WanloraError)),
            WorkerError(
                f"all {num_workers} workers were killed before everything was encoded; what was "
                "encoded is kept: run the same command again"
            ),
        )
    return settled(config, plan, merged(made, workers=num_workers))


def _start(config: CacheLatentsConfig, plan: Plan, rank: Rank) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, config, plan, rank), daemon=True)
    process.start()
    theirs.close()
    return _Worker(rank, process, ours)


def _serve(pipe: Connection, config: CacheLatentsConfig, plan: Plan, rank: Rank) -> None:
    """Run in the process of a worker: the share of a rank, and its outcome into the pipe."""
    logging.getLogger("wanlora").setLevel(logging.ERROR)  # the parent speaks for all
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who passes it on
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // rank.world))
    with suppress(KeyboardInterrupt), interrupted_by_signals([signal.SIGTERM]):
        try:
            using = same_encoders(config, plan.using, local_rank=rank.local)
            outcome: Encoded | WanloraError = encode_share(
                config, replace(plan, using=using), rank, shown=False
            )
        except WanloraError as error:
            outcome = error
        pipe.send(outcome)


def _stop_with_parent() -> None:
    """End as on Ctrl-C when the parent has been killed, so that no GPU stays taken."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    signal.raise_signal(signal.SIGTERM)


def _watch(workers: Sequence[_Worker], config: CacheLatentsConfig, plan: Plan) -> None:
    """Show what is committed until every worker has ended, and say who ended early."""
    committed = [
        (Committed(config.cache, "text", plan.fingerprint("text")), set(plan.missing_prompts)),
        (
            Committed(config.cache, "latents", plan.fingerprint("latents")),
            {keyed.key for keyed in plan.missing_clips},
        ),
    ]
    total = sum(len(wanted) for _, wanted in committed)
    running, done = list(workers), 0
    with shown_progress(total, "encode", "row", shown=True) as progress:
        while running:
            ended = wait([worker.pipe for worker in running], timeout=POLL_S)
            for worker in [worker for worker in running if worker.pipe in ended]:
                running.remove(worker)
                _hear(worker, num_left=len(running))
            there = sum(len(rows().present(wanted)) for rows, wanted in committed)
            progress(there - done, f"{len(running)} workers" if running else "")
            done = there


def _hear(worker: _Worker, *, num_left: int) -> None:
    """Take the outcome of a worker that has ended; one that died has left none."""
    try:
        worker.outcome = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        code = worker.process.exitcode or 0
        why = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
    else:
        if isinstance(worker.outcome, Encoded) or not num_left:
            return  # the last one's refusal is the run's
        why = f"stopped: {worker.outcome}"
    after = "; others take over its work" if num_left else ""
    log.warning("worker %d %s%s", worker.rank.index, why, after)


def _stop(workers: Sequence[_Worker]) -> None:
    """End what is still running, which publishes what it has encoded."""
    for worker in workers:
        if worker.outcome is None:
            worker.process.terminate()
    for worker in workers:
        worker.process.join()
        worker.pipe.close()
