"""The device that is chosen, and what threads and launchers must not do to it."""

import os
import threading

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import real_size
from wanlora.adapters.lora import adapter_parameters
from wanlora.commands.cache_latents.prefetch import Prefetcher
from wanlora.core.buckets import Bucket
from wanlora.cost.flops import TransformerShape
from wanlora.errors import ConfigError, DeviceError
from wanlora.processes.ranks import rank_of
from wanlora.store.views import ViewClip
from wanlora.training import batches, distributed, flow, predict, trial, validation
from wanlora.training.batches import BatchSource, MicroBatch, read_ahead
from wanlora.training.masters import Masters
from wanlora.training.outcomes import Outcomes
from wanlora.training.validation import Panel, losses
from wanlora.wan import device as devices
from wanlora.wan.denoise import denoise

CPU = torch.device("cpu")
LATENTS = torch.ones(1, 16, 2, 4, 4)
BATCH = MicroBatch(
    ("a",), LATENTS, LATENTS, torch.ones(1), torch.ones(1), torch.ones(1, 512, 8)
)  # fmt: skip
REAL_MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture
def a_mac(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_auto_never_takes_mps(a_mac):
    assert devices.select_device("auto", "micro") == CPU
    with pytest.raises(DeviceError, match="--device mps"):
        devices.select_device("auto", REAL_MODEL)


def test_mps_is_used_when_named_with_a_warning(a_mac, monkeypatch, caplog):
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(2))
    assert devices.select_device("mps", "micro").type == "mps"
    assert "on device mps" in caplog.text


def test_copies_do_not_run_ahead_except_to_cuda(monkeypatch):
    """MPS reads pageable memory after `to` has returned; only CUDA waits for it."""
    asked = []
    original = torch.Tensor.to

    def to(tensor, *arguments, **keywords):
        asked.append(keywords.get("non_blocking", False))
        return original(tensor, *arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "to", to)
    predict.predict(lambda **given: (given["hidden_states"],), BATCH, CPU, torch.float32)
    assert asked
    assert not any(asked)


class Doubles(TorchDispatchMode):
    """Collect the operators that make float64, which MPS does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.names.append(func.name())
        return result


def test_a_validation_table_is_float64_on_the_host_alone(monkeypatch):
    clip = ViewClip("a", "k", Bucket(5, 16, 16), ("p",), "walk", "val", "g")
    source = object.__new__(BatchSource)
    object.__setattr__(source, "seed", 0)
    monkeypatch.setattr(BatchSource, "latents", lambda *_: torch.ones(16, 2, 2, 2))
    monkeypatch.setattr(BatchSource, "padded_prompt", lambda *_: torch.ones(4, 8))
    with Doubles() as made:
        table = losses(
            Panel("val", (clip,), (0.3, 0.7)), lambda **given: (given["hidden_states"],), source,
            device=CPU, dtype=torch.float32,
        )  # fmt: skip
    assert table.dtype == np.float64
    # The copy to the host, after the table has left the device; numpy only looks at it, through a
    # detached tensor since torch 2.10.
    assert [name for name in made.names if name != "aten::detach"] == ["aten::_to_copy"]


def test_a_step_and_a_preview_make_no_float64_on_the_device():
    shape = TransformerShape(
        num_layers=1, num_attention_heads=2, attention_head_dim=16, ffn_dim=64, text_dim=32
    )
    model = real_size.transformer(shape, rank=2, device="cpu", dtype=torch.float32)
    given = trial.random_batch(Bucket(5, 16, 16), 1, num_channels=16, text_shape=(512, 32))
    masters, outcomes = Masters(adapter_parameters(model)), Outcomes(CPU, 1)
    optimizer = torch.optim.AdamW(masters.parameters.values())
    with Doubles() as made:
        loss = flow.loss_per_clip(*predict.predict(model, given, CPU, torch.float32))
        torch.autograd.backward((loss * given.weights).sum())
        masters.accumulate()
        values = outcomes.gather(loss.detach(), masters.clip(1.0), None)
        masters.clear_gradient_if(~torch.isfinite(values).all())
        optimizer.step()
        masters.publish()
        outcomes.note(0, values, learning_rate=1e-4, waited_s=0.0)
        outcomes.arrived(all_of_them=True)
    assert not made.names
    with Doubles() as made:
        denoise(
            model, prompt_embeds=given.prompt_embeds[0], negative_embeds=given.prompt_embeds[0],
            shape=(16, 2, 2, 2), steps=2, guidance_scale=3.0, shift=3.0, seed=0, device=CPU,
            dtype=torch.float32,
        )  # fmt: skip
    assert set(made.names) <= {"aten::lift_fresh"}  # the scheduler's numpy array, on the host


def test_threads_of_every_pool_set_their_gpu_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    chosen: dict[int, int] = {}

    def set_device(index):
        chosen[threading.get_ident()] = index

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    used: dict[int, int | None] = {}

    def work(*_):
        used[threading.get_ident()] = chosen.get(threading.get_ident())
        return BATCH

    first = devices.current_in_thread(torch.device("cuda:1"))
    ahead = Prefetcher(work, range(8), threads=2, depth=4, initializer=first)
    list(ahead)
    assert set(used.values()) == {1}
    used.clear()
    monkeypatch.setattr(
        batches, "current_in_thread", lambda _: devices.current_in_thread(torch.device("cuda"))
    )
    source = object.__new__(BatchSource)
    monkeypatch.setattr(BatchSource, "read", work)
    for future in read_ahead(source, [(step, (0,)) for step in range(8)], depth=4, device=CPU):
        future.result()
    assert set(used.values()) == {3}  # "cuda" is the GPU of the thread that opened the pool


SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_srun_alone_starts_the_processes_of_one_run(monkeypatch):
    monkeypatch.setattr(os, "environ", SLURM | ADDRESS)
    distributed.set_torch_variables()
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1",
    }  # fmt: skip
    assert rank_of(os.environ).world == 4
    monkeypatch.setattr(os, "environ", dict(SLURM))
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=\$\(scontrol"):
        distributed.set_torch_variables()


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
          "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, []),
        ({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16"},
         ["FSDP", "dtype"]),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "1.5"},
         ["DeepSpeed", "optimizer.max_grad_norm"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["--eager"]),
    ],
)  # fmt: skip
def test_settings_of_accelerate_that_are_not_used_are_named_once(
    environment, named, monkeypatch, caplog
):
    monkeypatch.setattr(os, "environ", dict(environment))
    distributed.warn_of_accelerate_settings()
    assert len(caplog.records) == bool(named)
    for name in (*named, *([*environment] if named else [])):
        assert name in caplog.text
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ  # accelerate would import it


def test_ranks_meet_before_they_sum_a_validation(monkeypatch):
    order = []
    monkeypatch.setattr(
        validation.dist, "all_reduce", lambda tensor, **_: order.append(tuple(tensor.shape))
    )
    source = object.__new__(BatchSource)
    losses(
        Panel("val", (), (0.3,)), None, source, device=CPU, dtype=torch.float32, rank=0,
        num_ranks=2, barrier=lambda: order.append("barrier"),
    )  # fmt: skip
    assert order == ["barrier", (0, 1), ()]  # the losses of no clips, and the stop request


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_loaded_straight_to_a_device_is_the_same(micro_folder, dtype):
    """Only a GPU is loaded to in this way; the CPU shows that it changes no bit and no type."""
    options = {"dtype": dtype, "local_files_only": True}
    part = micro_folder / "transformer"
    expected, found = (
        dict(model.named_parameters()) | dict(model.named_buffers())
        for model in (
            WanTransformer3DModel.from_pretrained(part, **options),
            WanTransformer3DModel.from_pretrained(part, **options, device_map={"": CPU}),
        )
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name])


def test_a_gpu_that_is_full_is_not_taken_for_one_that_does_not_work(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(DeviceError, match=r"cuda:1 .*free memory.*--device"):
        devices.select_device("cuda:1", "micro")


def test_the_micro_model_is_called_a_toy_except_in_the_demo(caplog, monkeypatch, micro_folder):
    monkeypatch.delenv(devices.DEMO, raising=False)
    for model in ("micro", str(micro_folder)):
        caplog.clear()
        devices.warn_of_toy(model)
        assert "toy" in caplog.text
    caplog.clear()
    monkeypatch.setenv(devices.DEMO, "1")
    devices.warn_of_toy("micro")
    monkeypatch.delenv(devices.DEMO)
    devices.warn_of_toy("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert not caplog.text
