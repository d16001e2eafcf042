"""The processes that train one run together: what they agree on, and how a lost one is named.

Owns: the process group, and the waits for one another outside of a step's own collectives. Of one
process, every wait is over at once.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from wanlora.core.fingerprint import difference
from wanlora.errors import ConfigError, LostRankError, RunError, WanloraError
from wanlora.processes.ranks import rank_of
from wanlora.wan.device import use_expandable_segments

ROLL_CALL = timedelta(seconds=60)
"""For those who waited in the same collective to notice, too, that it broke off."""

NEWS_S = 0.2
"""Until the threads that listen have heard of an end that one of them complains of."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Ranks:
    """An open process group, as the launcher set it up in the environment.

    Beside the devices' own group (NCCL on GPUs) there is a line between the hosts, over TCP: a
    process that is gone is missed there, by its number, before a collective on the devices hangs.

    Args:
        device: Where this process computes; on a machine of several GPUs each process gets its own.
        timeout_s: Longest that a process waits for the others.

    Raises:
        LostRankError: They do not find one another.
    """

    def __init__(self, device: torch.device, *, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._line: Any = None
        with _explained_start(timeout_s):
            state = PartialState(cpu=device.type == "cpu", timeout=self._timeout)
            if state.num_processes > 1:
                self._line = dist.new_group(backend="gloo", timeout=self._timeout)
                if state.device.type == "cuda":  # NCCL takes its memory before the trial
                    dist.all_reduce(torch.zeros(1, device=state.device))
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.device: torch.device = state.device if self.count > 1 else device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def barrier(self) -> None:
        """Wait until every process is here.

        Raises:
            LostRankError: One has ended, or does not come in time; the main process names it.
        """
        if self.count > 1:
            with self.explained():
                self._barrier(self._timeout)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Find out which process is gone when a wait for all of them breaks off.

        Raises:
            LostRankError: In the place of the network's error.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_of_the_network(error):
                raise
            raise self._lost(str(error)) from error

    def from_main(self, make: Callable[[], T]) -> T:
        """Let the main process make a value, and give it to all; its refusal stops all.

        Raises:
            WanloraError: The main process's own, there; elsewhere a word that it refuses.
        """
        if self.count == 1:
            return make()
        if not self.is_main:
            received: T = self._receive()
            return received
        try:
            value = make()
        except WanloraError:
            self._broadcast(_Refusal())
            raise
        self._broadcast(value)
        return value

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes that would train different runs, as nodes with other files would.

        Raises:
            RunError: Names the first process that differs from the main one, and in what.
        """
        if self.count == 1:
            return
        everyone: list[Any] = [None] * self.count
        with self.explained():
            dist.all_gather_object(everyone, dict(facts), group=self._line)
        for index, theirs in enumerate(everyone):
            if differing := difference(theirs, everyone[0]):
                raise self._disagreement(index, differing)

    def close(self) -> None:
        """Leave the process group, after the last wait."""
        if self.count > 1:
            dist.destroy_process_group()

    def _broadcast(self, value: Any) -> None:
        with self.explained():
            dist.broadcast_object_list([value], group=self._line)

    def _receive(self) -> Any:
        received: list[Any] = [None]
        with self.explained():
            dist.broadcast_object_list(received, group=self._line)
        if isinstance(received[0], _Refusal):
            raise _see_process_0()
        return received[0]

    def _disagreement(self, index: int, differing: Sequence[str]) -> RunError:
        """Word it once: all processes come to know of it, and write to one terminal."""
        if not self.is_main:
            return _see_process_0()
        return RunError(
            f"process {index} of {self.count} does not train the run of process 0:\n  "
            + "\n  ".join(differing)
            + "\nGive every process the same command and the same release, and all nodes the same "
            "--cache and --output-dir"
        )

    def _barrier(self, timeout: timedelta) -> None:
        dist.monitored_barrier(self._line, timeout=timeout, wait_all_ranks=True)

    def _lost(self, said: str) -> LostRankError:
        """Say who is gone, when the network has complained."""
        lost = _silent(said) or self._disconnected() or _silent(self._roll_call())
        who = f"process{'es' if ',' in lost else ''} {lost}" if lost else "another process"
        return LostRankError(
            f"lost {who}: ended, or no answer for {self._timeout.total_seconds():g} s "
            "(process_timeout_s); see the last output of that process or of the launcher. Saved "
            "checkpoints are complete: continue with the same command and --resume, on any number "
            f"of processes. The network's error: {said.splitlines()[0]}"
        )

    def _disconnected(self) -> str:
        """Processes that have ended: their end of the line is closed, so nothing can be sent."""
        time.sleep(NEWS_S)
        lost = []
        for rank in range(self.count):
            try:
                if rank != self.index:
                    dist.isend(torch.zeros(1), rank, group=self._line)
            except RuntimeError:
                lost.append(str(rank))
        return ", ".join(lost)

    def _roll_call(self) -> str:
        """Meet those whose collective broke off too, and return the complaint about the others."""
        try:
            self._barrier(min(self._timeout, ROLL_CALL))
        except RuntimeError as error:
            return str(error)
        return ""


@contextmanager
def _explained_start(timeout_s: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _is_of_the_network(error):
            raise
        raise LostRankError(
            f"the processes of this run do not find one another ({str(error).splitlines()[0]}): "
            f"start all of them within {timeout_s:g} s (process_timeout_s), with the address and "
            "port of one main process; where nodes have several networks, name the one they share "
            "in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error


def _silent(said: str) -> str:
    """Who did not come, from a barrier's complaint: rank 0 hears of all, the others only of it."""
    if "waiting for send/recv from rank 0" in said:
        return "0"
    named = re.search(r"Ranks ([0-9, ]+) failed to pass", said)
    return named[1] if named else ""


class _Refusal:
    """What the main process tells the others in the place of a value."""


def _see_process_0() -> LostRankError:
    return LostRankError("process 0 refuses this run: its message says why")


def _is_of_the_network(error: RuntimeError) -> bool:
    said = str(error)
    return isinstance(error, dist.DistError) or "gloo" in said.lower() or "monitoredBarrier" in said


def prepare_process() -> None:
    """Take this process's place among those of its launcher, before anything is on a GPU.

    Raises:
        ConfigError: See `adopt_launcher`.
    """
    adopt_launcher()
    warn_of_accelerate_settings()
    own_device()


def own_device() -> None:
    """Make `cuda` mean this process's own GPU, before anything takes memory on the first one.

    Some schedulers let a process see its own GPU alone; it is then number 0, whatever the process.
    """
    use_expandable_segments()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank_of(os.environ).local % torch.cuda.device_count())


def adopt_launcher() -> None:
    """Give torch the place of this process in the variables that it reads, whoever started it.

    Raises:
        ConfigError: srun started several processes, and no address is set on which they can meet.
    """
    rank = rank_of(os.environ)
    if rank.world == 1:
        return
    os.environ.update(rank.environment())
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(
            f"srun started {rank.world} processes for one run, and MASTER_ADDR and MASTER_PORT are "
            "not set. In the batch script: export MASTER_ADDR=$(scontrol show hostnames "
            "$SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500; or start torchrun with srun"
        )


NOT_USED = {
    "ACCELERATE_USE_FSDP": "FSDP (each process holds the whole transformer; to save memory: "
    "--activations full, or a smaller --batch-size)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (each process holds the whole transformer; to save "
    "memory: --activations full, or a smaller --batch-size)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (each process holds the whole transformer)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config (each process holds the whole "
    "transformer)",
    "ACCELERATE_MIXED_PRECISION": "mixed_precision (use --set dtype=bfloat16 or float32)",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo_backend (blocks are compiled on a GPU; --eager turns that "
    "off)",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps (use "
    "--gradient-accumulation-steps)",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping (use --set optimizer.max_grad_norm)",
}
"""Variables that `accelerate launch` sets from its configuration, and what replaces them."""
_OFF = frozenset({"", "0", "1", "no", "none", "false"})
"""Values without an effect; 1 is that of accumulation."""


def warn_of_accelerate_settings() -> None:
    """Warn once of settings of `accelerate launch` that this command does not use."""
    found = {
        name: value
        for name in NOT_USED
        if (value := os.environ.get(name, "")).lower() not in _OFF
        or (value == "1" and "_USE_" in name)
    }
    if found:
        logger.warning(
            "these settings of accelerate are not used:\n%s",
            "\n".join(f"  {name}={value}: {NOT_USED[name]}" for name, value in found.items()),
        )
    # accelerate would import DeepSpeed, and refuse when it is not installed.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
