"""Which rank a process is, by the variables of its launcher; and the board of a run on Ray."""

import pytest

from wanlora.cache_latents.board import Board
from wanlora.core.ranks import ALONE, Rank, rank_of
from wanlora.errors import ConfigError

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


def test_what_a_dead_worker_held_comes_before_what_nobody_has_taken():
    board = Board({"text": [{"p": "a prompt"}], "latents": [{"a": 1, "b": 2}, {"c": 3}, {"d": 4}]})
    assert board.take(0, "latents") == {"a": 1, "b": 2}
    assert board.take(1, "latents") == {"c": 3}
    board.tell(0, 1)
    assert board.state() == (1, 2, {0, 1})
    held, told = board.ended(0)
    assert (held, told) == ([("latents", {"a": 1, "b": 2})], 1)
    assert board.state().holders == {1}
    board.put_back([("latents", {"b": 2})])
    assert [board.take(1, "latents") for _ in range(3)] == [{"b": 2}, {"d": 4}, None]
    assert board.take(1, "text") == {"p": "a prompt"}
    assert board.state().waiting == 0
