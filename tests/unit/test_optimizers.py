"""Optimizers: no decay for magnitudes, the memory of their tensors, states by name."""

import copy

import pytest
import torch

from wanlora.training.optimizers import load_state, make_optimizer, missing_bytes, state_of

NAMES = ("m.lora_A.weight", "m.lora_magnitude_vector.weight")


def parameters():
    return {name: torch.nn.Parameter(torch.ones(64)) for name in NAMES}


def step(optimizer, given, gradient):
    for parameter in given.values():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


def adamw(given, name="adamw"):
    return make_optimizer(
        given, name=name, learning_rate=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5
    )


def test_magnitudes_do_not_decay():
    given = parameters()
    step(adamw(given), given, 0.0)
    factor, magnitude = given.values()
    assert (factor < 1).all()
    assert (magnitude == 1).all()


def test_a_state_with_magnitudes_continues_bit_for_bit():
    whole = parameters()
    optimizer = adamw(whole)
    for _ in range(2):
        step(optimizer, whole, 0.1)
    saved = copy.deepcopy(state_of(optimizer, whole))
    parts = {name: torch.nn.Parameter(p.detach().clone()) for name, p in whole.items()}
    resumed = adamw(parts)
    load_state(resumed, parts, saved)
    step(optimizer, whole, 0.2)
    step(resumed, parts, 0.2)
    assert all(torch.equal(whole[name], parts[name]) for name in NAMES)
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_the_memory_of_an_optimizer_is_known_before_its_first_step(name):
    if name == "prodigy":
        pytest.importorskip("prodigyopt", reason="prodigyopt is not installed")
    given = parameters()
    optimizer = adamw(given, name=name)
    expected = missing_bytes(optimizer, name, 128)
    step(optimizer, given, 0.1)
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    found = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.dim())
    assert found == expected
    assert missing_bytes(optimizer, name, 128) == 0
