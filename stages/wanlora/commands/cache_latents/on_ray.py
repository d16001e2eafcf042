"""Workers on Ray: actors that hold the encoders, fed by decode tasks on all cores of a cluster.

    driver: plan, bar, view
    worker: one actor per GPU   <- frames of a bounded window of clips -   decode: one task per core

Owns: all calls of Ray; nothing else imports it. Actors are ranks like local processes: they share
only the store, so its replacement and the other actors make the rows of an actor that died.
"""

import functools
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.find_encoders import Encoders, find_encoders
from wanlora.commands.cache_latents.frames import decode_remotely
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.commands.cache_latents.plan import Plan
from wanlora.commands.cache_latents.worker import (
    CommittedOfPlan,
    Encoded,
    encode_share,
    for_workers,
    merge,
    reconcile,
    require_same_encoders,
    shown_progress,
)
from wanlora.data.clip import Clip
from wanlora.errors import LostProcessError, MediaError, WanloraError, WorkerError
from wanlora.media.source import SourceHashes
from wanlora.processes.ranks import Rank
from wanlora.wan.model_folder import local_folder

ACTOR_DIED = (RayActorError, OutOfMemoryError)
"""Ray raises OutOfMemoryError, not RayActorError, for an actor that it killed to free memory."""

POLL_S = 1.0
CONNECT_S = 10.0
"""Seconds for a cluster to answer."""

MAX_DEATHS = 3
"""Actors that may die one after the other while no row is committed."""

LEFTOVER_S = 60.0
"""Once one actor has finished, every row is made; the others have this long to finish."""

log = logging.getLogger(__name__)


@contextmanager
def workers(
    settings: EncodeSettings,
    *,
    num_workers: int | None,
    gpus_per_worker: float | None,
    dry_run: bool,
) -> Iterator["Workers"]:
    """Start actors in a running cluster, or in a new one on this machine; end them afterwards.

    Args:
        settings: The cache, the model, the types and the limits.
        num_workers: Number of actors; None starts one per GPU, or one.
        gpus_per_worker: GPUs of an actor; None is 1, or 0 without GPUs.
        dry_run: True if nothing will be encoded.

    Raises:
        WorkerError: No cluster answers at RAY_ADDRESS.
        WanloraError: The first actor cannot encode, for example because of its model or device.
    """
    ours = _connect()
    try:
        num_workers, gpus = _size(settings.device, num_workers, gpus_per_worker)
        actors = Workers(settings, num_workers, gpus, dry_run=dry_run)
        try:
            yield actors
        finally:
            actors.close()
    finally:
        if ours:
            ray.shutdown()


def _connect() -> bool:
    """Join the cluster of RAY_ADDRESS or of this machine, or start one; False if already joined."""
    if ray.is_initialized():
        return False
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        _require_answer(address)
        ray.init(**quiet)
        return True
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", include_dashboard=False, **quiet)
    return True


def _require_answer(address: str) -> None:
    """Refuse an address that does not answer, which Ray would try for minutes.

    Raises:
        WorkerError: No program listens at the address.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return  # auto, local
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise WorkerError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start one there with ray "
            "start --head, or unset RAY_ADDRESS to use this machine alone"
        ) from None


class Workers:
    """Actors that encode, one for each rank.

    Attributes:
        encoders: Encoders of the first actor that was ready; the others must have the same.

    Args:
        settings: The cache, the model, the types and the limits.
        num_workers: Number of actors.
        gpus: GPUs of each actor.
        dry_run: True if nothing will be encoded.

    Raises:
        WanloraError: The first actor cannot encode.
    """

    def __init__(
        self, settings: EncodeSettings, num_workers: int, gpus: float, *, dry_run: bool
    ) -> None:
        self._settings = _absolute(settings)
        self._num_workers = num_workers
        # No core of their own: on a small machine decoding would never get one.
        self._actor: Any = ray.remote(num_cpus=0, num_gpus=gpus)(_Worker)
        self._actors = {index: self._start(index) for index in range(self._num_workers)}
        found = [actor.encoders.remote(dry_run=dry_run) for actor in self._actors.values()]
        ready, _ = ray.wait(found, num_returns=1)
        try:
            first = ray.get(ready[0])
        except ACTOR_DIED as error:
            raise WorkerError(f"an actor died before it had found the model: {error}") from None
        if isinstance(first, WanloraError):
            raise first
        self.encoders: Encoders = first

    def close(self) -> None:
        """End the actors at once."""
        for actor in self._actors.values():
            ray.kill(actor)

    def encode(self, plan: Plan) -> Encoded:
        """Encode the missing rows, until one actor has finished and the others have ended too.

        Raises:
            WorkerError: Several actors died one after the other, and no row was committed.
            WanloraError: No actor is left; the error of the last one.
        """
        plan = _absolute_clips(replace(plan, encoders=self.encoders))
        committed = CommittedOfPlan(self._settings.cache, for_workers(plan))
        sent = ray.put(for_workers(plan))
        running = {actor.work.remote(sent): index for index, actor in self._actors.items()}
        made: list[Encoded] = []
        deaths = done = 0
        deadline = float("inf")
        with shown_progress(committed.total, "encode", "row", shown=True) as progress:
            while running and time.monotonic() < deadline:
                ready, _ = ray.wait(list(running), timeout=POLL_S)
                there = committed.count()
                progress(there - done, f"{len(running)} workers")
                deaths, done = 0 if there > done else deaths, there
                for future in ready:
                    index = running.pop(future)
                    outcome = _outcome(future)
                    if isinstance(outcome, Encoded):
                        made.append(outcome)
                        deadline = min(deadline, time.monotonic() + LEFTOVER_S)
                    elif outcome is None:
                        deaths += 1
                        if deaths >= MAX_DEATHS:
                            raise _too_many_deaths(committed.total - done)
                        log.warning("worker %d died; it is started again", index)
                        self._actors[index] = self._start(index)
                        running[self._actors[index].work.remote(committed.left())] = index
                    elif running or made:
                        # Otherwise it would keep its GPU from an actor that waits for one.
                        ray.kill(self._actors.pop(index))
                        log.warning("worker %d stopped: %s; others take over", index, outcome)
                    else:
                        raise outcome
        return reconcile(self._settings.cache, plan, merge(made, workers=self._num_workers))

    def _start(self, index: int) -> Any:
        return self._actor.remote(self._settings, Rank(index, self._num_workers))


def _outcome(future: Any) -> Encoded | WanloraError | None:
    """Return what an actor returned, or None if it died."""
    try:
        outcome: Encoded | WanloraError = ray.get(future)
    except ACTOR_DIED:
        return None
    return outcome


def _too_many_deaths(num_left: int) -> WorkerError:
    return WorkerError(
        f"{MAX_DEATHS} workers died one after the other, and no row was committed meanwhile; "
        f"{num_left} rows are left. Ray's logs have the reason, usually too little memory: start "
        "fewer workers with --num-workers. The encoded rows are kept; run the same command again"
    )


class _Worker:
    """Encodes on one device, in a Ray process. Errors are results: the other actors continue."""

    def __init__(self, settings: EncodeSettings, rank: Rank) -> None:
        logging.getLogger("wanlora").setLevel(logging.ERROR)  # the driver logs for all
        self._settings = settings
        self._rank = rank

    def encoders(self, *, dry_run: bool) -> Encoders | WanloraError:
        """Find the model and the device of this process."""
        try:
            hashes = Hashes.read(self._settings.cache)
            return find_encoders(self._settings, hashes, dry_run=dry_run)
        except WanloraError as error:
            return error

    def work(self, plan: Plan) -> Encoded | WanloraError:
        """Encode the share of this rank, and the rows that others leave."""
        try:
            encoders = require_same_encoders(self._settings, plan.encoders)
            return encode_share(
                self._settings,
                replace(plan, encoders=encoders),
                self._rank,
                shown=False,
                decode_clip=partial(_decode_elsewhere, sources=dict(plan.sources)),
            )
        except WanloraError as error:
            return error


@functools.cache
def _decode_task() -> Any:
    """Make one remote function for all clips; the cluster would keep every one."""
    return ray.remote(num_cpus=1, max_retries=1)(decode_remotely)


def _decode_elsewhere(
    clip: Clip, num_frames: int | None, *, sources: SourceHashes
) -> torch.Tensor | MediaError:
    """Decode a clip on any core of the cluster; a file that kills its process fails alone."""
    try:
        frames = ray.get(_decode_task().remote(clip, num_frames, sources.get(str(clip.path))))
    except (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError) as error:
        reason = "took too much memory" if isinstance(error, OutOfMemoryError) else "crashed"
        return LostProcessError("unreadable", f"{clip.path}: the process decoding it {reason}")
    # A copy: the array is in the shared memory of Ray, and read-only.
    return frames if isinstance(frames, MediaError) else torch.from_numpy(frames.copy())


def _absolute_clips(plan: Plan) -> Plan:
    """Make the paths of clips absolute: an actor has another working folder."""
    return replace(
        plan,
        missing_clips={
            kind: tuple(
                replace(keyed, clip=replace(keyed.clip, path=keyed.clip.path.absolute()))
                for keyed in clips
            )
            for kind, clips in plan.missing_clips.items()
        },
    )


def _absolute(settings: EncodeSettings) -> EncodeSettings:
    """Make the paths of settings absolute: an actor has another working folder."""
    cache, model = settings.cache, settings.model
    return replace(
        settings,
        cache=cache.absolute() if isinstance(cache, Path) else cache,
        model=str(Path(model).expanduser().absolute()) if local_folder(model) else model,
    )


def _size(device: str, num_workers: int | None, gpus_per_worker: float | None) -> tuple[int, float]:
    """Number of actors, and the GPUs of each."""
    found = float(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    each = gpus_per_worker
    if each is None:
        each = 1.0 if found and device != "cpu" else 0.0
    num_workers = num_workers or max(1, int(found / each) if each else 1)
    if num_workers * each > found:
        log.warning(
            "%d workers need %g GPUs each, and the cluster has %g; those without a GPU wait",
            num_workers, each, found,
        )  # fmt: skip
    return num_workers, each
