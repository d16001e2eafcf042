"""What only a GPU can show: no host sync, the kernel that was pinned, uploads beside computing."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.support import real_size
from wanlora.adapters.lora import adapter_parameters
from wanlora.core.buckets import Bucket
from wanlora.cost.memory import step_bytes
from wanlora.training import flow
from wanlora.training.fitting import fit
from wanlora.training.masters import Masters
from wanlora.training.outcomes import Outcomes
from wanlora.training.predict import predict
from wanlora.training.trial import random_batch
from wanlora.training.workload import workload
from wanlora.wan.attention import pinned, watched
from wanlora.wan.blocks import set_activations
from wanlora.wan.device import current_in_thread
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
    return random_batch(BUCKET, 1, num_channels=16, text_shape=(512, 4096))


def test_an_upload_arrives_whole():
    expected = batch()._replace(noise=torch.randn(1, 16, 5, 30, 52))
    found = expected.upload(torch.cuda.Stream(CUDA)).wait()
    torch.cuda.synchronize()
    assert torch.equal(found.noise.cpu(), expected.noise)
    assert found.latents.is_cuda


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
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
        element_bytes=2,
    )  # fmt: skip
    work = replace(work, shape=real_size.shape_of("t2v-1.3b", num_layers=LAYERS))
    torch.cuda.reset_peak_memory_stats()
    trial = fit(
        transformer, work, BUCKET, variant, activations=way, kernel="auto", device=CUDA,
        dtype=torch.bfloat16,
    )  # fmt: skip
    counted = step_bytes(replace(work, num_uploaded=1), trial.modes)
    expected = counted.weights + counted.kept + counted.working  # masters and moments are not here
    assert 0.7 * expected < trial.peak_bytes < 1.1 * expected


def gradients(kernel, length, num_keys):
    """Gradients of query, key and value, bf16, at a head size of 128."""
    draws = torch.Generator("cuda").manual_seed(0)

    def draw(tokens):
        return torch.randn(
            1, 4, tokens, 128, generator=draws, device=CUDA, dtype=torch.bfloat16
        ).requires_grad_()

    query, key, value = draw(length), draw(num_keys), draw(num_keys)
    with pinned(kernel, CUDA):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        weights = torch.randn(out.shape, generator=draws, device=CUDA, dtype=torch.bfloat16)
        torch.autograd.backward((out.float() * weights.float()).sum())
    return [tensor.grad.double() for tensor in (query, key, value)]


@pytest.mark.parametrize("num_keys", [None, 512], ids=["self", "cross"])
@pytest.mark.parametrize("length", [1016, 1024, 3960])  # 1016 and 3960 are 120 mod 128, as 32,760
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
def test_the_gradient_of_each_kernel_is_that_of_math(kernel, length, num_keys):
    expected = gradients("math", length, num_keys or length)
    found = gradients(kernel, length, num_keys or length)
    for wanted, gradient in zip(expected, found, strict=True):
        assert torch.isfinite(gradient).all()
        assert (gradient - wanted).norm() < 0.02 * wanted.norm()  # bf16 rounds at 0.4 %


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_threads_make_no_context_on_the_first_gpu():
    before = torch.cuda.mem_get_info(0)[0]
    second = torch.device("cuda:1")
    torch.cuda.set_device(second)
    try:
        stream = torch.cuda.Stream(second)
        initializer = current_in_thread(torch.device("cuda"))
        with ThreadPoolExecutor(1, initializer=initializer) as pool:
            pool.submit(lambda: batch().upload(stream).wait()).result()
    finally:
        torch.cuda.set_device(0)
    assert before - torch.cuda.mem_get_info(0)[0] < 100 * 2**20
