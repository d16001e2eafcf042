"""A step's numbers arrive one step late and lose nothing on the way."""

import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import real_size
from wanlora.adapters.lora import adapter_parameters
from wanlora.commands.train.step_errors import explain_memory
from wanlora.core.buckets import Bucket
from wanlora.core.out_of_memory import explained_out_of_memory
from wanlora.errors import DeviceError
from wanlora.runs.checkpoints import Progress
from wanlora.training import flow
from wanlora.training.masters import Masters
from wanlora.training.outcomes import Outcomes
from wanlora.training.predict import predict
from wanlora.training.trial import random_batch
from wanlora.training.workload import Trial
from wanlora.wan.blocks import set_activations

CPU = torch.device("cpu")


def note(outcomes, step, losses, grad_norm=1.0, stop=None, *, save=False):
    outcomes.start()
    values = outcomes.gather(torch.tensor(losses), torch.tensor(grad_norm), stop, save=save)
    outcomes.note(step, values, learning_rate=1e-4, waited_s=0.25)


def test_the_last_step_is_taken_only_when_asked_for():
    outcomes = Outcomes(CPU, 1)
    note(outcomes, 0, [0.5, 0.25])
    assert outcomes.arrived(all_of_them=False) == []
    note(outcomes, 1, [1.0, 3.0], grad_norm=2.0, stop=signal.SIGTERM, save=True)
    (first,) = outcomes.arrived(all_of_them=False)
    assert first.step == 0
    assert first.losses.tolist() == [0.5, 0.25]
    assert (first.stop, first.save) == (None, False)
    (last,) = outcomes.arrived(all_of_them=True)
    assert (last.step, last.grad_norm, last.stop, last.save) == (1, 2.0, signal.SIGTERM, True)
    assert (last.learning_rate, last.waited_s) == (1e-4, 0.25)
    assert last.seconds >= 0
    assert outcomes.arrived(all_of_them=True) == []


@pytest.mark.parametrize(
    ("losses", "grad_norm", "finite"),
    [([1.0, 2.0], 1.0, True), ([1.0, np.nan], 1.0, False), ([1.0, 2.0], np.inf, False)],
)
def test_an_outcome_knows_whether_it_is_finite(losses, grad_norm, finite):
    outcomes = Outcomes(CPU, 1)
    note(outcomes, 0, losses, grad_norm)
    assert outcomes.arrived(all_of_them=True)[0].is_finite is finite


def test_a_step_asks_nothing_of_the_device():
    """On the meta device there are no values: asking for one raises, as a host sync would wait."""
    meta = torch.device("meta")
    model = real_size.transformer(real_size.shape_of("t2v-1.3b", num_layers=1), rank=4)
    set_activations(model, ("selective",), compiled=False)
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        torch.ones((), device=meta).item()
    masters = Masters(adapter_parameters(model))
    outcomes = Outcomes(meta, 1)
    optimizer = torch.optim.AdamW(masters.parameters.values(), lr=1e-4)
    batch = random_batch(Bucket(5, 32, 48), 2, num_channels=16, text_shape=(512, 4096))
    for _ in range(2):
        prediction, target = predict(model, batch, meta, torch.bfloat16)
        losses = flow.loss_per_clip(prediction, target) * batch.weights.to(meta)
        torch.autograd.backward(losses.sum() / 2)
        masters.accumulate()
        grad_norm = masters.clip(1.0)
        values = outcomes.gather(losses.detach(), grad_norm, signal.SIGTERM)
        masters.clear_gradient_if(~torch.isfinite(values).all())
        optimizer.step()
        masters.zero_grad()
        masters.publish()
    assert values.shape == (5,)  # two losses, the requests to stop and to save, the norm


def test_memory_that_runs_out_later_says_how_to_go_on():
    trial = Trial(("none",) * 2, seconds=1.0, peak_bytes=None, attention=())
    with (
        pytest.raises(DeviceError, match=r"after 7 steps.*--output-dir run --resume --activations"),
        explained_out_of_memory(partial(explain_memory, Path("run"), Progress(step=7), trial)),
    ):
        torch.empty(2**50)


def test_refused_gradients_are_cleared_and_others_kept():
    parameter = torch.nn.Parameter(torch.zeros(3))
    masters = Masters({"m.lora_A.weight": parameter})
    parameter.grad = torch.tensor([1.0, torch.nan, 2.0])
    masters.accumulate()
    masters.clear_gradient_if(torch.tensor(False))
    gradient = masters.parameters["m.lora_A.weight"].grad
    assert torch.isnan(gradient).any()
    masters.clear_gradient_if(torch.tensor(True))
    assert gradient.tolist() == [0, 0, 0]
