"""Which base model a loss or a checkpoint belongs to."""

import copy

import torch

from wanlora.wan.base_fingerprint import base_fingerprint


def test_a_base_is_known_by_its_values_in_fp32_and_in_bf16():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    same = copy.deepcopy(model)
    assert base_fingerprint(same) == base_fingerprint(model)
    assert base_fingerprint(same.to(torch.bfloat16)) == base_fingerprint(model)


def test_another_base_of_the_same_shapes_is_another():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight.mul_(1.1)
    swapped = torch.nn.Sequential(model[1], model[0])
    assert len({base_fingerprint(each) for each in (model, other, swapped)}) == 3
