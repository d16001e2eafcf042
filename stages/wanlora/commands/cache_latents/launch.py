"""Start of the workers of a run: this process, processes of this machine, or Ray actors.

Owns: the choice of a launcher, and the signals while workers encode.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from wanlora.commands.cache_latents import local_workers
from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.find_encoders import Encoders, find_encoders
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.commands.cache_latents.plan import Plan, check_disk
from wanlora.commands.cache_latents.worker import Encoded, encode_share
from wanlora.core.location import Location
from wanlora.errors import ConfigError
from wanlora.processes.ranks import Rank
from wanlora.processes.signals import interrupted_by_signals

EncodePlan = Callable[[Plan], Encoded]
"""Encodes the missing rows of a plan, in this process or in workers."""

log = logging.getLogger(__name__)


@contextmanager
def launched(
    settings: EncodeSettings,
    hashes: Hashes,
    rank: Rank,
    *,
    launcher: str,
    num_workers: int | None,
    gpus_per_worker: float | None,
    timeout_s: float,
    dry_run: bool,
) -> Iterator[tuple[Encoders, EncodePlan]]:
    """Find the encoders of the workers, and yield them with the function that encodes a plan.

    Args:
        settings: The cache, the model, the types and the limits.
        hashes: Known hashes; new ones are added.
        rank: Rank of this process if torchrun or srun started it; it is then the only worker here.
        launcher: local or ray.
        num_workers: Number of workers; None starts one per GPU.
        gpus_per_worker: GPUs of a Ray actor.
        timeout_s: A local worker that finishes no row for this many seconds is killed.
        dry_run: True if nothing will be encoded.

    Raises:
        ConfigError: Ray is not installed.
        WanloraError: The model or the device cannot be used.
    """
    if launcher == "ray":
        with _on_ray().workers(
            settings, num_workers=num_workers, gpus_per_worker=gpus_per_worker, dry_run=dry_run
        ) as workers:
            yield workers.encoders, workers.encode
        return
    encoders = find_encoders(settings, hashes, local_rank=rank.local, dry_run=dry_run)

    def encode_plan(plan: Plan) -> Encoded:
        number = 1
        if rank.world == 1:
            number = local_workers.number_for(plan, num_workers=num_workers, device=settings.device)
        if number > 1:
            return local_workers.encode(settings, plan, num_workers=number, timeout_s=timeout_s)
        return encode_share(settings, plan, rank)

    yield encoders, encode_plan


def _on_ray() -> ModuleType:
    """Import the module that needs Ray.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        from wanlora.commands.cache_latents import on_ray  # noqa: PLC0415  (an extra, and slow to import)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("--launcher ray needs Ray: pip install 'wanlora[ray]'") from None
    return on_ray


def encode_missing(cache: Location, plan: Plan, hashes: Hashes, encode_plan: EncodePlan) -> Encoded:
    """Encode the missing rows of a plan, after a check of the disk; SIGTERM stops it like Ctrl-C.

    Raises:
        StoreError: The disk is too small, or the cache cannot be written.
        WanloraError: No worker could finish.
        KeyboardInterrupt: SIGINT or SIGTERM; encoded rows are kept.
    """
    check_disk(cache, plan.num_bytes)
    hashes.write_sources(cache)
    with interrupted_by_signals():
        try:
            return encode_plan(plan)
        except KeyboardInterrupt:
            log.warning("stopped; encoded rows are kept. To continue, run the same command")
            raise
