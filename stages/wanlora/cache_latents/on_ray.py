"""Workers on Ray: actors that hold the encoders, fed by decode tasks on whatever cores there are.

    driver: plan, bar, view        board: an actor that hands out chunks
    worker: an actor a GPU  <- frames of a bounded window of clips -  decode: tasks of a core each

Owns: all that is said to Ray; nothing else imports it. An actor that dies is replaced, and what it
had not committed goes back to the board. Actors write to the store themselves.
"""

import functools
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate
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

from wanlora.cache_latents import plan as planning
from wanlora.cache_latents.board import Board, Chunk
from wanlora.cache_latents.decode import decode_remotely
from wanlora.cache_latents.encode import encode_clips, encode_prompts
from wanlora.cache_latents.hashes import Hashes
from wanlora.cache_latents.plan import Encoders, Plan
from wanlora.cache_latents.walk import Committed, whole
from wanlora.cache_latents.worker import (
    PROMPTS_WORTH_LOADING,
    Encoded,
    bucket_of,
    merged,
    same_encoders,
    settled,
    shown_progress,
)
from wanlora.clips import SourceHashes
from wanlora.config import CacheLatentsConfig
from wanlora.errors import LostProcessError, MediaError, WanloraError, WorkerError
from wanlora.manifest import Clip
from wanlora.store.schema import Kind
from wanlora.wan.variants import local_folder

ACTOR_DIED = (RayActorError, OutOfMemoryError)
"""One that Ray ends for its memory is not a RayActorError."""

POLL_S = 1.0
PATIENCE_S = 10.0
"""For a cluster to answer."""

MAX_DEATHS = 3
"""Actors that may die of a chunk before it is taken for the reason."""

log = logging.getLogger(__name__)


@contextmanager
def workers(config: CacheLatentsConfig) -> Iterator["Workers"]:
    """Start actors in a running cluster, or in one of this machine's own; end them afterwards.

    Raises:
        WorkerError: There is no cluster where RAY_ADDRESS says.
        WanloraError: Why the first actor cannot encode: its model, its device.
    """
    ours = _connect()
    try:
        crew = Workers(config)
        try:
            yield crew
        finally:
            crew.close()
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
    """Refuse an address where nobody listens, which Ray would try for minutes.

    Raises:
        WorkerError: Nobody does.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return  # auto, local
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE_S).close()
    except OSError as error:
        raise WorkerError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start one there with ray "
            "start --head, or unset RAY_ADDRESS to use this machine alone"
        ) from None


class Workers:
    """Actors that encode, and what they encode with.

    Attributes:
        using: The encoders of the first actor that was ready; the others must have the same.

    Args:
        config: The settings.

    Raises:
        WanloraError: Why the first actor cannot encode.
    """

    def __init__(self, config: CacheLatentsConfig) -> None:
        self._config = _absolute(config)
        self._num_workers, gpus = _size(config)
        # No core of their own: on a small machine decoding would wait for one for ever.
        self._actor: Any = ray.remote(num_cpus=0, num_gpus=gpus)(_Worker)
        self._actors: list[Any] = [
            self._actor.remote(self._config) for _ in range(self._num_workers)
        ]
        self._idle = list(range(self._num_workers))
        self._running: dict[Any, int] = {}
        self._made: list[Encoded] = []
        self._deaths: Counter[str] = Counter()
        ready, _ = ray.wait([actor.encoders.remote() for actor in self._actors], num_returns=1)
        try:
            first = ray.get(ready[0])
        except ACTOR_DIED as error:
            raise WorkerError(f"an actor died before it had found the model: {error}") from None
        if isinstance(first, WanloraError):
            raise first
        self.using: Encoders = first

    def close(self) -> None:
        """End the actors, whatever they are at."""
        for actor in self._actors:
            ray.kill(actor)

    def encode(self, plan: Plan) -> Encoded:
        """Encode what is missing, until nothing waits and no living actor holds a chunk.

        Raises:
            WorkerError: A chunk has killed several actors; names its clips.
            WanloraError: No actor is left; what the last one refused with.
        """
        start_board: Any = ray.remote(num_cpus=0)(Board)
        board = start_board.remote(_chunks(self._config, plan))
        total = len(plan.missing_clips) + len(plan.missing_prompts)
        shown = 0
        with shown_progress(total, "encode", "row", shown=True) as progress:
            while True:
                state = ray.get(board.state.remote())
                done = min(total, state.done)  # what is made again is told of again
                progress(done - shown, f"{len(self._running)} workers" if self._running else "")
                shown = done
                for _ in range(min(len(self._idle), state.waiting)):
                    self._set_to_work(board, plan)
                if not state.waiting and not state.holders & set(self._running.values()):
                    break
                for future in ray.wait(list(self._running), timeout=POLL_S)[0]:
                    self._hear(future, board, plan)
        ray.kill(board)
        return settled(self._config, plan, merged(self._made, workers=self._num_workers))

    def _set_to_work(self, board: Any, plan: Plan) -> None:
        index = self._idle.pop(0)
        sources = dict(plan.sources)
        work = self._actors[index].work.remote(board, index, self.using, plan.largest, sources)
        self._running[work] = index

    def _hear(self, future: Any, board: Any, plan: Plan) -> None:
        """Take an actor's outcome; what one that has not come to its end held goes back."""
        index = self._running.pop(future)
        try:
            outcome = ray.get(future)
        except ACTOR_DIED:
            outcome = None
        held, told = ray.get(board.ended.remote(index))
        if isinstance(outcome, Encoded):
            self._made.append(outcome)
            self._idle.append(index)
            return
        left = _uncommitted(self._config, held, plan)
        if outcome is None:
            self._count_death(held, told)
            why = "died"
            self._actors.append(self._actor.remote(self._config))
            self._idle.append(len(self._actors) - 1)
        elif self._running or self._idle:
            ray.kill(self._actors[index])  # or it would keep its GPU from one that waits for it
            why = f"stopped: {outcome}"
        else:
            raise outcome
        rows = sum(len(chunk) for _, chunk in left)
        log.warning("worker %d %s; others take over its %d rows", index, why, rows)
        ray.get(board.put_back.remote(left))

    def _count_death(self, held: Sequence[tuple[Kind, Chunk]], told: int) -> None:
        """Give up on a chunk that takes down whoever encodes it.

        Raises:
            WorkerError: Names its rows.
        """
        ends = accumulate(len(chunk) for _, chunk in held)
        at = next((chunk for (_, chunk), end in zip(held, ends, strict=True) if told < end), {})
        self._deaths[next(iter(at), "")] += 1
        if max(self._deaths.values()) < MAX_DEATHS:
            return
        rows = [row.clip_id if isinstance(row, Clip) else repr(row) for row in at.values()]
        doing = f"encoding one of {', '.join(rows)}" if rows else "loading the encoders"
        raise WorkerError(
            f"{MAX_DEATHS} workers died {doing}; what was encoded is kept. Ray's logs have the "
            "reason, most often too little memory: start fewer with --num-workers, or take these "
            "clips out of the manifest"
        )


class _Worker:
    """Encodes on one device, in a process of Ray's; refusals are results, as others go on."""

    def __init__(self, config: CacheLatentsConfig) -> None:
        logging.getLogger("wanlora").setLevel(logging.ERROR)  # the driver speaks for all
        self._config = config

    def encoders(self) -> Encoders | WanloraError:
        """The model and the device of this process."""
        try:
            return planning.encoders_here(self._config, Hashes.read(self._config.cache))
        except WanloraError as error:
            return error

    def work(
        self, board: Any, index: int, wanted: Encoders, largest: int, sources: SourceHashes
    ) -> Encoded | WanloraError:
        """Take chunks from the board and encode them until none is waiting."""

        def chunks(kind: Kind) -> Iterator[Chunk]:
            while (chunk := ray.get(board.take.remote(index, kind))) is not None:
                yield chunk

        def tell(rows: int, _note: str) -> None:
            board.tell.remote(index, rows)

        try:
            using = same_encoders(self._config, wanted)
            return Encoded(
                encode_prompts(self._config, using, chunks("text"), tell),
                encode_clips(
                    self._config, using, chunks("latents"), tell,
                    largest=largest, decoded_by=partial(_decode_elsewhere, sources=sources),
                ),
            )  # fmt: skip
        except WanloraError as error:
            return error


@functools.cache
def _decode_task() -> Any:
    """One for all clips: each made anew would be kept by the cluster."""
    return ray.remote(num_cpus=1, max_retries=1)(decode_remotely)


def _decode_elsewhere(clip: Clip, sources: SourceHashes) -> torch.Tensor | MediaError:
    """Decode a clip on any core of the cluster; a file that kills its process fails alone."""
    try:
        frames = ray.get(_decode_task().remote(clip, sources.get(str(clip.path))))
    except (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError) as error:
        reason = "took too much memory" if isinstance(error, OutOfMemoryError) else "crashed"
        return LostProcessError("unreadable", f"{clip.path}: the process decoding it {reason}")
    # A copy: what Ray gives lies in its shared memory, and may not be written.
    return frames if isinstance(frames, MediaError) else torch.from_numpy(frames.copy())


def _chunks(config: CacheLatentsConfig, plan: Plan) -> dict[Kind, list[Chunk]]:
    """Cut what is missing into segments; prompts into what is worth loading UMT5 for."""
    clips = {
        keyed.key: replace(keyed.clip, path=keyed.clip.path.absolute())
        for keyed in plan.missing_clips
    }
    rows = config.store.clips_per_segment
    return {
        "text": _cut(plan.missing_prompts, max(rows, PROMPTS_WORTH_LOADING)),
        "latents": [part for group in whole(clips, alike=bucket_of) for part in _cut(group, rows)],
    }


def _cut(rows: Mapping[str, Any], most: int) -> list[Chunk]:
    items = list(rows.items())
    return [dict(items[i : i + most]) for i in range(0, len(items), most)]


def _uncommitted(
    config: CacheLatentsConfig, held: Sequence[tuple[Kind, Chunk]], plan: Plan
) -> list[tuple[Kind, Chunk]]:
    """What is left to do of chunks that an actor had; those that were done are left out."""
    there = {
        kind: Committed(config.cache, kind, plan.fingerprint(kind)).look()
        for kind in {kind for kind, _ in held}
    }
    left = [
        (kind, {key: row for key, row in chunk.items() if key not in there[kind]})
        for kind, chunk in held
    ]
    return [(kind, chunk) for kind, chunk in left if chunk]


def _absolute(config: CacheLatentsConfig) -> CacheLatentsConfig:
    """Settings that mean the same in the working folder of an actor."""
    cache, model = config.cache, config.model
    return config.model_copy(
        update={
            "cache": cache.absolute() if isinstance(cache, Path) else cache,
            "model": str(Path(model).expanduser().absolute()) if local_folder(model) else model,
        }
    )


def _size(config: CacheLatentsConfig) -> tuple[int, float]:
    """How many actors, and the GPUs of each."""
    found = float(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    each = config.gpus_per_worker
    if each is None:
        each = 1.0 if found and config.device != "cpu" else 0.0
    num_workers = config.num_workers or max(1, int(found / each) if each else 1)
    if num_workers * each > found:
        log.warning(
            "%d workers ask for %g GPUs each, and the cluster has %g; those that find none wait",
            num_workers, each, found,
        )  # fmt: skip
    return num_workers, each
