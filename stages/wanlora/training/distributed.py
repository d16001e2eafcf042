"""The processes that train one run together: shared values, barriers, and errors of a lost process.

Owns: the process group, and all communication outside of a step's collectives. With one process,
nothing waits.
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

ROLL_CALL_TIMEOUT = timedelta(seconds=60)
"""Time for other processes to notice that the same collective has failed."""

CLOSE_WAIT_S = 0.2
"""Seconds until closed connections are known to all threads of the backend."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Ranks:
    """An open process group, with the environment variables of the launcher.

    Besides the devices' group (NCCL on GPUs) there is a group of the hosts over TCP. A barrier
    there names a lost process before a collective on the devices hangs.

    Args:
        device: Device of this process; with several GPUs each process gets its own.
        timeout_s: Maximum seconds that a process waits for the others.

    Raises:
        LostRankError: The processes cannot connect.
    """

    def __init__(self, device: torch.device, *, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._hosts: Any = None
        with _explained_start(timeout_s):
            state = PartialState(cpu=device.type == "cpu", timeout=self._timeout)
            if state.num_processes > 1:
                self._hosts = dist.new_group(backend="gloo", timeout=self._timeout)
                if state.device.type == "cuda":  # NCCL takes its memory before the trial
                    dist.all_reduce(torch.zeros(1, device=state.device))
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.device: torch.device = state.device if self.count > 1 else device

    @property
    def is_main(self) -> bool:
        """True if this process writes files and shows progress."""
        return self.index == 0

    def barrier(self) -> None:
        """Wait for all processes.

        Raises:
            LostRankError: One has ended, or does not answer in time; the main process names it.
        """
        if self.count > 1:
            with self.explained():
                self._barrier(self._timeout)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Replace errors of the network inside the block by one that names the lost process.

        Raises:
            LostRankError: Instead of the network's error.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_of_the_network(error):
                raise
            raise self._lost_rank_error(str(error)) from error

    def from_main(self, make: Callable[[], T]) -> T:
        """Make a value on the main process and send it to all; an error there stops all.

        Raises:
            WanloraError: The error of the main process; on the others, a reference to it.
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
        """Check that all processes have the same facts; nodes may have different files.

        Raises:
            RunError: Names the first process that differs from the main one, and the differences.
        """
        if self.count == 1:
            return
        everyone: list[Any] = [None] * self.count
        with self.explained():
            dist.all_gather_object(everyone, dict(facts), group=self._hosts)
        for index, theirs in enumerate(everyone):
            if differing := difference(theirs, everyone[0]):
                raise self._disagreement(index, differing)

    def close(self) -> None:
        """Leave the process group, after the last wait."""
        if self.count > 1:
            dist.destroy_process_group()

    def _broadcast(self, value: Any) -> None:
        with self.explained():
            dist.broadcast_object_list([value], group=self._hosts)

    def _receive(self) -> Any:
        received: list[Any] = [None]
        with self.explained():
            dist.broadcast_object_list(received, group=self._hosts)
        if isinstance(received[0], _Refusal):
            raise _see_process_0()
        return received[0]

    def _disagreement(self, index: int, differing: Sequence[str]) -> RunError:
        """Only the main process has the full text: all write to the same terminal."""
        if not self.is_main:
            return _see_process_0()
        return RunError(
            f"process {index} of {self.count} does not train the run of process 0:\n  "
            + "\n  ".join(differing)
            + "\nGive every process the same command and the same release, and all nodes the same "
            "--cache and --output-dir"
        )

    def _barrier(self, timeout: timedelta) -> None:
        dist.monitored_barrier(self._hosts, timeout=timeout, wait_all_ranks=True)

    def _lost_rank_error(self, error: str) -> LostRankError:
        """Find the lost processes after an error of the network."""
        lost = _absent_ranks(error) or self._disconnected() or _absent_ranks(self._roll_call())
        who = f"process{'es' if ',' in lost else ''} {lost}" if lost else "another process"
        return LostRankError(
            f"lost {who}: ended, or no answer for {self._timeout.total_seconds():g} s "
            "(process_timeout_s); see the last output of that process or of the launcher. Saved "
            "checkpoints are complete: continue with the same command and --resume, on any number "
            f"of processes. The network's error: {error.splitlines()[0]}"
        )

    def _disconnected(self) -> str:
        """Processes that have ended: their connection is closed, so sending fails."""
        time.sleep(CLOSE_WAIT_S)
        lost = []
        for rank in range(self.count):
            try:
                if rank != self.index:
                    dist.isend(torch.zeros(1), rank, group=self._hosts)
            except RuntimeError:
                lost.append(str(rank))
        return ", ".join(lost)

    def _roll_call(self) -> str:
        """Wait for processes whose collective failed too; return the error about the others."""
        try:
            self._barrier(min(self._timeout, ROLL_CALL_TIMEOUT))
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
            f"the processes of this run cannot connect ({str(error).splitlines()[0]}): "
            f"start all of them within {timeout_s:g} s (process_timeout_s), with the address and "
            "port of one main process; if nodes have several networks, name the one they share "
            "in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error


def _absent_ranks(error: str) -> str:
    """Ranks that a barrier's error names: all absent ones on rank 0, only rank 0 on the others."""
    if "waiting for send/recv from rank 0" in error:
        return "0"
    named = re.search(r"Ranks ([0-9, ]+) failed to pass", error)
    return named[1] if named else ""


class _Refusal:
    """Sent by the main process instead of a value, after an error."""


def _see_process_0() -> LostRankError:
    return LostRankError("process 0 stopped the run; see its error message")


def _is_of_the_network(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text.lower() or "monitoredBarrier" in text


def prepare_process() -> None:
    """Set this process's rank and GPU, before anything is on a GPU.

    Raises:
        ConfigError: See `set_torch_variables`.
    """
    set_torch_variables()
    warn_of_accelerate_settings()
    select_own_gpu()


def select_own_gpu() -> None:
    """Make this process's own GPU the current one, before anything takes memory on the first one.

    Some schedulers show a process only its own GPU, which then has the number 0.
    """
    use_expandable_segments()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank_of(os.environ).local % torch.cuda.device_count())


def set_torch_variables() -> None:
    """Set the variables from which torch reads the rank of this process, for any launcher.

    Raises:
        ConfigError: srun started several processes, and the address of the main one is not set.
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
    "ACCELERATE_USE_FSDP": "FSDP (each process has the whole transformer; to save memory: "
    "--activations full, or a smaller --batch-size)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (each process has the whole transformer; to save "
    "memory: --activations full, or a smaller --batch-size)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (each process has the whole transformer)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config (each process has the whole "
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
"""Values without an effect; 1 is the default of accumulation."""


def warn_of_accelerate_settings() -> None:
    """Warn of settings of `accelerate launch` that this command does not use."""
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
    # accelerate would import DeepSpeed, and fail if it is not installed.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
