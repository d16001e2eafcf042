"""A step: no host sync, memory as counted, uploads beside computing, the device of each thread."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from tests.support import steps_without_waiting
from wanlora.core.buckets import Bucket
from wanlora.training.batches import BatchSource, read_ahead
from wanlora.training.masters import Masters
from wanlora.training.trial import random_batch
from wanlora.wan.device import current_in_thread

BUCKET = Bucket(17, 240, 416)


class Drawn(BatchSource):
    """A source of micro-batches, each with its step's number in it."""

    def __init__(self):
        """Without a store."""

    def read(self, step, slots):
        batch = random_batch(BUCKET, len(slots), num_channels=16, text_shape=(512, 64))
        return batch._replace(sigmas=torch.full((len(slots),), step / 8), clip_ids=(str(step),))


def test_batches_read_ahead_arrive_whole_and_in_order_while_the_device_computes(device):
    """A GPU's allocator must not give the memory of a batch in use to the next upload."""
    expected = Drawn().read(0, (0,)).latents
    work = torch.ones(64, 64, device=device)
    arrived = []
    plan = [(step, (0,)) for step in range(8)]
    for future in read_ahead(Drawn(), plan, depth=3, device=device):
        batch = future.result().wait()
        for _ in range(50):
            work = work @ work / 64  # keeps the queue of a GPU full
        arrived.append((batch.sigmas.clone(), batch.latents.clone(), batch.latents.device.type))
    assert [float(sigmas) for sigmas, _, _ in arrived] == [step / 8 for step in range(8)]
    for _, latents, where in arrived:
        assert where == device.type
        assert torch.equal(latents.cpu(), expected)


def test_gradients_are_summed_by_the_process_group_of_the_device(device):
    """NCCL, or gloo on a CPU, with one process: the sum is the gradient itself."""
    backend = {"cuda": "nccl", "cpu": "gloo"}[device.type]
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        masters = Masters({"a": torch.nn.Parameter(torch.ones(1000, device=device))})
        masters.flat_gradient.copy_(torch.linspace(-1, 1, 1000))
        masters.sum_over_ranks()
        gathered = [torch.empty(3, device=device)]
        dist.all_gather(gathered, torch.tensor([1.0, 2.0, 3.0], device=device))
        assert torch.equal(masters.flat_gradient.cpu(), torch.linspace(-1, 1, 1000))
        assert gathered[0].tolist() == [1.0, 2.0, 3.0]
    finally:
        dist.destroy_process_group()


def test_no_step_waits_for_the_device(device, figures_of):
    """On a GPU torch raises at each wait, from the third step on, eager and compiled."""
    if device.type == "cuda":
        found = figures_of("steps_without_waiting")
        assert list(found) == ["eager", "compiled"]
    else:
        found = {"eager": steps_without_waiting.take_steps(device, compiled=False)}
    for steps in found.values():
        assert steps == {"arrived": [2], "finite": True}


@pytest.mark.gpu
def test_the_counted_peak_is_not_exceeded(device, figures_of):
    """Four blocks of T2V-1.3B at 81x480x832, compiled."""
    found = figures_of("counted_peak", "none", "selective")
    assert list(found) == ["none", "selective"]
    for peaks in found.values():
        assert 0.85 * peaks["counted"] < peaks["measured"] < 1.05 * peaks["counted"]


def test_a_thread_uses_the_gpu_of_its_process(device):
    initializer = current_in_thread(device)
    look = torch.cuda.current_device if device.type == "cuda" else lambda: None
    with ThreadPoolExecutor(1, initializer=initializer) as pool:
        assert pool.submit(look).result() == look()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_threads_make_no_context_on_the_first_gpu(device):
    before = torch.cuda.mem_get_info(0)[0]
    second = torch.device("cuda:1")
    torch.cuda.set_device(second)
    try:
        stream = torch.cuda.Stream(second)
        batch = Drawn().read(0, (0,))
        with ThreadPoolExecutor(1, initializer=current_in_thread(device)) as pool:
            pool.submit(lambda: batch.upload(stream).wait()).result()
    finally:
        torch.cuda.set_device(0)
    assert before - torch.cuda.mem_get_info(0)[0] < 100 * 2**20
