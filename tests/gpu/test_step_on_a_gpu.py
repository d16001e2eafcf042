"""What only a GPU can show: no host sync, the kernel that was pinned, uploads beside computing."""

from dataclasses import replace

import pytest
import torch

from tests.support import real_size
from wanlora.core import flow
from wanlora.core.buckets import Bucket
from wanlora.core.memory import step_bytes
from wanlora.step.fitting import fit, workload
from wanlora.step.masters import Masters
from wanlora.step.predict import predict
from wanlora.step.trial import made_up_batch
from wanlora.train.outcomes import Outcomes
from wanlora.wan.adapter import adapter_parameters
from wanlora.wan.attention import pinned, watched
from wanlora.wan.blocks import set_activations
from wanlora.wan.variants import VARIANTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda")
BUCKET = Bucket(17, 240, 416)
LAYERS = 4


def model(targets="attention"):
    shape = real_size.shape_of("t2v-1.3b", num_layers=LAYERS)
    return real_size.transformer(shape, targets=targets, device="cuda")


def batch():
    return made_up_batch(BUCKET, 1, num_channels=16, text_shape=(512, 4096))


def test_an_upload_arrives_whole():
    expected = batch()._replace(noise=torch.randn(1, 16, 5, 30, 52))
    found = expected.upload(torch.cuda.Stream(CUDA)).wait()
    torch.cuda.synchronize()
    assert torch.equal(found.noise.cpu(), expected.noise)
    assert found.latents.is_cuda


@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_waits_for_the_device(compiled):
    transformer = model()
    set_activations(transformer, ("selective",) * LAYERS, compiled=compiled)
    masters, outcomes = Masters(adapter_parameters(transformer)), Outcomes(CUDA, 1)
    optimizer = torch.optim.AdamW(masters.parameters.values(), lr=1e-4)
    stream, on_host = torch.cuda.Stream(CUDA), batch()
    for step in range(4):
        if step == 2:  # compiled and warm by now
            torch.cuda.set_sync_debug_mode("error")
        try:
            outcomes.start()
            given = on_host.upload(stream).wait()
            prediction, target = predict(transformer, given, CUDA, torch.bfloat16)
            losses = flow.loss_per_clip(prediction, target) * given.weights
            torch.autograd.backward(losses.sum())
            masters.accumulate()
            values = outcomes.gather(losses.detach(), masters.clip(1.0), None)
            masters.refuse(~torch.isfinite(values).all())
            optimizer.step()
            masters.zero_grad()
            masters.publish()
            outcomes.note(step, values, learning_rate=1e-4, waited_s=0.0)
            arrived = outcomes.arrived(all_of_them=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [outcome.step for outcome in arrived] == [2]
    assert all(outcome.is_finite for outcome in outcomes.arrived(all_of_them=True))


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_the_pinned_kernel_runs_forward_and_backward(kernel):
    transformer = model()
    set_activations(transformer, ("full",) * LAYERS, compiled=False)
    with pinned(kernel, CUDA), watched() as operators:
        prediction, _ = predict(transformer, batch(), CUDA, torch.bfloat16)
        prediction.float().square().mean().backward()
    assert operators == {f"_scaled_dot_product_{kernel}_attention"}


@pytest.mark.parametrize("way", ["none", "selective", "full"])
def test_the_counted_peak_is_not_exceeded(way):
    transformer, variant = model(), VARIANTS["t2v-1.3b"]
    names = {name.partition(".lora_")[0] for name in adapter_parameters(transformer)}
    work = workload(
        variant, BUCKET, batch_size=1, rank=32, adapted=names, compiled=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    work = replace(work, shape=real_size.shape_of("t2v-1.3b", num_layers=LAYERS))
    torch.cuda.reset_peak_memory_stats()
    trial = fit(
        transformer, work, BUCKET, variant, activations=way, device=CUDA, dtype=torch.bfloat16
    )
    # Less what the trial does not hold: masters and moments.
    assert trial.peak_bytes < 1.1 * step_bytes(work, trial.modes).total
