"""The processes that train one run together: what they agree on, and how a lost one is named.

Owns: the process group, each process's share of a global batch, and the waits for one another
outside of a step's own collectives. Of one process, every wait is over at once.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from wanlora.core.fingerprint import difference
from wanlora.errors import ConfigError, DeviceError, LostProcessError, RunError, WanloraError

GO_ON = (
    "What was saved is whole: continue with the same command and --resume, with as many processes "
    "as there are"
)

T = TypeVar("T")


class Ranks:
    """An open process group, as the launcher set it up in the environment.

    Beside the devices' own group (NCCL on GPUs) there is a line between the hosts, over TCP: a
    process that is gone is missed there, by its number, before a collective on the devices hangs.

    Args:
        device: Where this process computes; on a machine of several GPUs each process gets its own.
        timeout_s: Longest that a process waits for the others.
    """

    def __init__(self, device: torch.device, *, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        state = PartialState(cpu=device.type == "cpu", timeout=self._timeout)
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.device: torch.device = state.device if self.count > 1 else device
        self._line: Any = None
        if self.count > 1:
            self._line = dist.new_group(backend="gloo", timeout=self._timeout)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def slots(self, batch_size: int, num_micro_batches: int) -> tuple[tuple[int, ...], ...]:
        """This process's slice of the global batch, cut into micro-batches.

        Args:
            batch_size: Clips in a micro-batch.
            num_micro_batches: In a step, over all processes.

        Raises:
            ConfigError: The processes cannot share them evenly.
        """
        if num_micro_batches % self.count:
            raise ConfigError(
                f"a global batch of {batch_size * num_micro_batches} clips (batch_size "
                f"{batch_size} x gradient_accumulation_steps {num_micro_batches}) cannot be shared "
                f"by {self.count} processes: make gradient_accumulation_steps a multiple of "
                f"{self.count}"
            )
        share = batch_size * num_micro_batches // self.count
        first = self.index * share
        starts = range(first, first + share, batch_size)
        return tuple(tuple(range(start, start + batch_size)) for start in starts)

    def meet(self, where: str) -> None:
        """Wait until every process is here.

        Args:
            where: In the run, for the message.

        Raises:
            LostProcessError: One has ended, or does not come in time; the main process names it.
        """
        if self.count == 1:
            return
        started = time.monotonic()
        try:
            dist.monitored_barrier(self._line, timeout=self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise self._lost(str(error), where, time.monotonic() - started) from None

    def from_main(self, make: Callable[[], T]) -> T:
        """Let the main process make a value, and give it to all; its refusal stops all.

        Raises:
            WanloraError: The main process's own, there; elsewhere a word that it refuses.
        """
        if self.count == 1:
            return make()
        if not self.is_main:
            said: list[Any] = [None]
            dist.broadcast_object_list(said, group=self._line)
            if said[0] is None:
                raise LostProcessError("process 0 refuses this run: its message says why")
            value: T = said[0][0]
            return value
        try:
            value = make()
        except WanloraError:
            dist.broadcast_object_list([None], group=self._line)
            raise
        dist.broadcast_object_list([(value,)], group=self._line)
        return value

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes that would train different runs, as nodes with other files would.

        Raises:
            RunError: Names the first process that differs from the main one, and in what.
        """
        if self.count == 1:
            return
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, dict(facts), group=self._line)
        for index, theirs in enumerate(everyone):
            differing = difference(theirs, everyone[0])
            if differing and self.is_main:
                raise RunError(
                    f"process {index} of {self.count} does not train the run of process 0:\n  "
                    + "\n  ".join(differing)
                    + "\nGive every process the same command and the same release, and all nodes "
                    "the same --cache and --output-dir"
                )
            if differing:
                raise LostProcessError("process 0 refuses this run: its message says why")

    def close(self) -> None:
        """Leave the process group, after the last wait."""
        if self.count > 1:
            dist.destroy_process_group()

    def _lost(self, said: str, where: str, waited_s: float) -> LostProcessError:
        """Word the barrier's complaint: rank 0 hears of all, the others only of rank 0."""
        found = re.search(r"Ranks? ([0-9, ]+) failed to pass", said)
        lost = found[1].replace(",", ", ") if found else "0"
        timeout_s = self._timeout.total_seconds()
        how = (
            f"did not answer for {timeout_s:g} s (process_timeout_s)"
            if waited_s >= timeout_s
            else "has ended" + ("" if found else ", or has lost another")
        )
        return LostProcessError(
            f"process {lost} of {self.count} {how}, {where}: its own last words, or the "
            f"launcher's, say why. {GO_ON}"
        )


def own_device() -> None:
    """Make `cuda` mean this process's own GPU, before anything takes memory on the first one.

    Raises:
        DeviceError: The machine has fewer GPUs than the launcher started processes.
    """
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local and found:
        if local >= found:
            raise DeviceError(
                f"this is process {local} of this machine, counted from 0, and it has {found} "
                f"GPU{'s' if found > 1 else ''}: start at most {found} processes on it "
                f"(torchrun --nproc_per_node {found})"
            )
        torch.cuda.set_device(local)


@contextmanager
def explained_loss() -> Iterator[None]:
    """Say how a run goes on whose collective broke off because another process ended.

    Raises:
        LostProcessError: In the place of the network's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise LostProcessError(
            f"another process of this run ended or does not answer ({str(error).splitlines()[0]})"
            f": its own last words, or the launcher's, say why. {GO_ON}"
        ) from error
