"""The rank of a process, by the variables of its launcher."""

import pytest

from wanlora.errors import ConfigError
from wanlora.processes.ranks import ALONE, Rank, rank_of

SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(3, 8, 1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, Rank(5, 8, 1)),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "2"}, Rank(0, 2, 0)),  # torchrun inside srun
        (SLURM, ALONE),  # a batch script, outside srun
    ],
)
def test_a_rank_is_what_its_launcher_says(environment, expected):
    assert rank_of(environment) == expected
    assert rank_of(expected.environment()) == expected


@pytest.mark.parametrize("index", ["8", "-1", "first"])
def test_an_impossible_rank_is_refused_with_the_variables_that_say_so(index):
    with pytest.raises(ConfigError, match=rf"RANK={index}, WORLD_SIZE=8.*expected 0 <= RANK < "):
        rank_of({"RANK": index, "WORLD_SIZE": "8"})
