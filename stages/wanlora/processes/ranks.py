"""Which of several processes this one is, and what it takes next of the work they share.

Owns: reading the launcher's variables, and the arithmetic of sharing. Nothing here talks to another
process: ranks that see what is left choose apart from each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from wanlora.errors import ConfigError

T = TypeVar("T")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Of a step's tasks: a batch script outside `srun` has SLURM_PROCID and SLURM_NTASKS too, and is one
# process all the same.
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of several processes that a launcher has started, or will.

    Attributes:
        index: From 0.
        world: How many there are.
        local: Index among those of this machine: which GPU is its own.
    """

    index: int = 0
    world: int = 1
    local: int = 0

    def environment(self) -> dict[str, str]:
        """The variables that say so to a process, as torchrun sets them."""
        values = (self.index, self.world, self.local)
        return dict(zip(TORCHRUN, map(str, values), strict=True))


ALONE = Rank()


def rank_of(environment: Mapping[str, str]) -> Rank:
    """Read the variables of torchrun or srun; one process alone without any.

    Raises:
        ConfigError: They are no numbers, or the index is not below the number of processes.
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
            f"the environment says {found}; expected 0 <= {index} < {world}: unset these "
            "variables, or start the processes with torchrun or srun"
        )
    return ALONE


def share(left: Sequence[T], rank: Rank, *, most: int) -> Sequence[T]:
    """Choose what a rank takes next: the middle of its n-th of whatever is left, never nothing.

    Ranks that see about the same list land `len(left) / world` apart, whatever their number, speed
    and start, and a dead rank's part is spread over the living. As in guided self-scheduling
    (Polychronopoulos and Kuck, 1987) a share shrinks with what is left, here to a quarter of the
    rank's part at most, so that ranks who end apart repeat little.

    Args:
        left: What nobody is known to have done, in the order that all ranks have it in.
        rank: Who takes.
        most: Largest share.
    """
    size = max(1, min(most, len(left) // (4 * rank.world)))
    first = (2 * rank.index + 1) * len(left) // (2 * rank.world)
    return left[first : first + size]
