"""The choice of the attention kernel, on a CPU's own kernels and on planted wrong ones."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.support import planted_kernels
from wanlora.errors import DeviceError
from wanlora.training import kernel_probe
from wanlora.training.kernel_check import AttentionShape, shorter
from wanlora.training.kernel_probe import Candidate, choose_kernel, kernel_for
from wanlora.wan import attention

CPU = torch.device("cpu")
SHAPE = AttentionShape(
    num_tokens=80, other_tokens=frozenset(), batch_size=2, num_heads=2, head_dim=16,
    num_text_tokens=24, dtype=torch.float32, device=CPU,
)  # fmt: skip
FLASH, MATH = (Candidate(name, partial(attention.pinned, name, CPU)) for name in ("flash", "math"))


def planted(factor, name="planted"):
    """A kernel whose gradient of the value is multiplied by a factor."""
    return planted_kernels.planted(
        lambda query, key, value: (query, key, value * factor(query)), name
    )


def test_the_fastest_kernel_with_right_gradients_is_chosen():
    choice = choose_kernel(SHAPE, [FLASH, MATH], by_time=True)
    times = {each.name: each.milliseconds for each in choice.tried}
    assert set(times) == {"flash", "math"}
    assert all(time > 0 for time in times.values())
    assert choice.name == min(times, key=times.__getitem__)
    assert choice.num_tokens == 80
    assert all(f"{name} {time:.3g} ms" in choice.describe() for name, time in times.items())


def test_a_kernel_that_is_wrong_for_the_tokens_of_an_image_only_is_rejected():
    wrong = planted_kernels.planted(
        lambda query, key, value: (
            query, key, value * (1.05 if key.shape[2] == 257 else 1.0)
        ),
        "planted",
    )  # fmt: skip
    assert choose_kernel(SHAPE, [wrong, FLASH], by_time=False).name == "planted"
    reads_image = replace(SHAPE, num_image_tokens=257)
    choice = choose_kernel(reads_image, [wrong, FLASH], by_time=False)
    assert choice.name == "flash"
    assert "257 keys" in choice.tried[0].problem


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (lambda _: 1.05, "gradient of the value"),
        (lambda query: torch.where(query.new_tensor(range(16)) == 3, torch.nan, 1.0), "not finite"),
    ],
    ids=["5 % off", "NaN"],
)
@pytest.mark.parametrize("by_time", [True, False])
def test_a_kernel_with_wrong_gradients_is_rejected_and_named(factor, reason, by_time, caplog):
    choice = choose_kernel(SHAPE, [planted(factor), FLASH], by_time=by_time)
    assert choice.name == "flash"
    rejected = choice.tried[0]
    assert rejected.is_wrong
    assert rejected.milliseconds is None
    assert reason in rejected.problem
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "planted" in warning.message
    assert reason in warning.message
    with pytest.raises(DeviceError, match=rf"attention=planted .*{reason}"):
        choose_kernel(SHAPE, [planted(factor)], by_time=by_time)


def test_the_planted_kernel_is_right_without_its_fault():
    assert choose_kernel(SHAPE, [planted(lambda _: 1.0), FLASH], by_time=False).name == "planted"


def test_every_bucket_is_checked_at_its_own_remainder():
    """32,760 tokens are 120 mod 128; a fault at the end of a tile needs that remainder."""
    assert shorter(32_760, 1152) == 1144
    for tokens in (1, 128, 1152, 1153, 18_900, 32_760, 75_600):
        short = shorter(tokens, 1152)
        assert (tokens - short) % 128 == 0
        assert 1024 < short <= 1152 or short == tokens
    faulty = planted(lambda query: 0.5 if query.shape[2] % 128 == 5 else 1.0)
    whole = replace(SHAPE, num_tokens=128)
    assert choose_kernel(whole, [faulty, FLASH], by_time=False).name == "planted"
    other = replace(whole, other_tokens=frozenset({1285}))
    assert choose_kernel(other, [faulty, FLASH], by_time=False).name == "flash"


def test_attention_to_the_text_is_checked_too():
    faulty = Candidate(
        "planted", nullcontext,
        lambda q, k, v: scaled_dot_product_attention(q, k, v) * (1 + (k.shape[2] == 24)),
    )  # fmt: skip
    choice = choose_kernel(SHAPE, [faulty, FLASH], by_time=False)
    assert choice.name == "flash"
    assert "24 keys" in choice.tried[0].problem


def test_a_kernel_that_does_not_run_here_is_passed_over_in_silence(caplog):
    caplog.set_level(logging.INFO)
    names = ("cudnn", "efficient", "fa3", "fa4")
    missing = [Candidate(name, partial(attention.pinned, name, CPU)) for name in names]
    choice = choose_kernel(SHAPE, [*missing, MATH], by_time=True)
    assert choice.name == "math"
    assert all(each.problem and not each.is_wrong for each in choice.tried[:-1])
    assert not caplog.records
    with pytest.raises(DeviceError) as refused:
        choose_kernel(SHAPE, missing, by_time=True)
    assert all(f"{name}: " in str(refused.value) for name in names)
    assert "--set attention=math" in str(refused.value)


def test_another_kernel_in_place_of_the_named_one_is_noticed():
    with pytest.raises(DeviceError, match="_scaled_dot_product_flash_attention_for_cpu"):
        choose_kernel(SHAPE, [Candidate("cudnn", nullcontext)], by_time=False)


def test_a_deterministic_run_rejects_gradients_that_differ_between_passes():
    draws = iter(1 + 1e-5 * number for number in range(100))
    restless = planted(lambda _: next(draws))
    assert choose_kernel(SHAPE, [restless, FLASH], by_time=False).name == "planted"
    choice = choose_kernel(SHAPE, [restless, FLASH], by_time=False, deterministic=True)
    assert choice.name == "flash"
    assert "two passes" in choice.tried[0].problem


def test_a_cpu_and_a_deterministic_run_do_not_choose_by_time(monkeypatch):
    """Equal runs write equal files."""
    asked = []

    def note(_shape, _candidates, *, by_time, deterministic):
        asked.append((by_time, deterministic))
        return kernel_probe.KernelChoice("flash", 80, ())

    monkeypatch.setattr(kernel_probe, "choose_kernel", note)
    monkeypatch.setattr(attention, "candidates", lambda _: ("flash",))
    cuda = replace(SHAPE, device=torch.device("cuda"))
    kernel_for("auto", SHAPE)
    kernel_for("auto", cuda)
    kernel_for("auto", cuda, deterministic=True)
    assert asked == [(False, False), (True, False), (False, True)]


def test_a_kernel_that_fails_at_the_size_of_the_run_is_passed_over_with_a_warning(caplog):
    """The check is at no more than 1,152 tokens; an error at the full length must not end a run."""

    def attend(query, key, value):
        if query.shape[2] > 1152:
            raise RuntimeError("no execution plan")
        return scaled_dot_product_attention(query, key, value)

    shape = replace(SHAPE, num_tokens=1280, num_heads=1, head_dim=8, batch_size=1)
    choice = choose_kernel(shape, [Candidate("planted", nullcontext, attend), FLASH], by_time=True)
    assert choice.name == "flash"
    assert choice.tried[0].problem == "no execution plan"
    [warning] = caplog.records
    assert "planted" in warning.message
    assert "no execution plan" in warning.message


def test_the_only_kernel_of_a_device_is_not_offered_in_its_own_place(monkeypatch):
    def refuse(_shape, candidates, **_):
        raise DeviceError(f"attention={candidates[0].name} does not run")

    monkeypatch.setattr(kernel_probe, "choose_kernel", refuse)
    monkeypatch.setattr(attention, "candidates", lambda _: ("auto",))
    with pytest.raises(DeviceError, match=r"attention=auto does not.*--set attention=math"):
        kernel_for("auto", SHAPE)
    with pytest.raises(DeviceError, match=r"attention=cudnn does not.*--set attention=auto"):
        kernel_for("cudnn", SHAPE)


def test_a_kernel_without_memory_for_its_measurement_is_used_if_there_is_no_other(monkeypatch):
    def full(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(kernel_probe, "timed", full)
    choice = choose_kernel(SHAPE, [FLASH, MATH], by_time=True)
    assert choice.name == "flash"
    assert choice.tried[0].milliseconds is None
    assert "not measured" in choice.describe()


def test_a_cpu_measures_a_shorter_clip_with_the_same_remainder():
    real = replace(SHAPE, num_tokens=32_760, num_heads=12, head_dim=128)
    assert real.timed_tokens < 1000
    assert (32_760 - real.timed_tokens) % 128 == 0
    assert replace(real, device=torch.device("cuda")).timed_tokens == 32_760
