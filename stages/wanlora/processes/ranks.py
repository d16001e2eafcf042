"""The rank of this process among several, and its next share of their work.

Owns: reading the launcher's variables, and the arithmetic of sharing. Processes do not communicate
here: each rank chooses from the remaining work independently.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from wanlora.errors import ConfigError

T = TypeVar("T")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Only set in the tasks of a job step: a batch script outside `srun` also has SLURM_PROCID and
# SLURM_NTASKS, but is a single process.
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of several processes of a launcher.

    Attributes:
        index: Index of the process, from 0.
        world: Number of processes.
        local: Index among the processes of this machine; selects the GPU.
    """

    index: int = 0
    world: int = 1
    local: int = 0

    def environment(self) -> dict[str, str]:
        """Environment variables for this process, as torchrun sets them."""
        values = (self.index, self.world, self.local)
        return dict(zip(TORCHRUN, map(str, values), strict=True))


ALONE = Rank()


def rank_of(environment: Mapping[str, str]) -> Rank:
    """Read the variables of torchrun or srun; without them, this is the only process.

    Raises:
        ConfigError: They are not numbers, or the index is not below the number of processes.
    """
    for names in (TORCHRUN, SRUN):
        index, world, local = names
        if index not in environment or world not in environment:
            continue
        try:
            rank = Rank(
                int(environment[index]), int(environment[world]), int(environment.get(local, 0))
            )
        except ValueError:
            rank = Rank(-1)
        if 0 <= rank.index < rank.world and rank.local >= 0:
            return rank
        found = ", ".join(f"{name}={environment.get(name)}" for name in names)
        raise ConfigError(
            f"environment variables: found {found}; expected 0 <= {index} < {world}: unset these "
            "variables, or start the processes with torchrun or srun"
        )
    return ALONE


def share(left: Sequence[T], rank: Rank, *, most: int) -> Sequence[T]:
    """Choose the next share of a rank: the middle of its n-th of the remaining work, never empty.

    Ranks that see about the same list choose `len(left) / world` apart, for any number of ranks,
    speed and start time. The part of a dead rank is spread over the others. As in guided
    self-scheduling (Polychronopoulos and Kuck, 1987), a share shrinks with the remaining work, here
    to at most a quarter of the rank's part, so that little is done twice.

    Args:
        left: Work that is not known to be done, in the same order on all ranks.
        rank: The rank that chooses.
        most: Largest share.
    """
    size = max(1, min(most, len(left) // (4 * rank.world)))
    first = (2 * rank.index + 1) * len(left) // (2 * rank.world)
    return left[first : first + size]
