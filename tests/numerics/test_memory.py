"""Bytes and FLOPs of a step at full size, counted on the real model on the meta device.

The oracles are torch's: its FLOP counter, its saved-tensor hooks, and the storages alive between
operators.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.support import real_size
from tests.unit.test_memory import FULL_SIZE
from wanlora.adapters.targets import PRESETS, linear_names, match_targets
from wanlora.core.buckets import num_tokens
from wanlora.cost.flops import step_flops
from wanlora.cost.memory import Workload, block_bytes, step_bytes
from wanlora.wan.blocks import set_activations

TOKENS = num_tokens(FULL_SIZE)


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", real_size.fused_attention
    )


def work_of(shape, targets: str = "attention", quantize: str = "none") -> Workload:
    linears = linear_names(shape.num_layers, reads_image=shape.image_dim is not None)
    names = frozenset(match_targets(linears, targets))
    return Workload(shape, TOKENS, 1, 32, names, compiled=False, num_uploaded=0, quantize=quantize)


class Operators(TorchDispatchMode):
    """Counts operators by name, and the bytes of storages alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.alive: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator.name()] = self.calls.get(operator.name(), 0) + 1
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def gone(_: object) -> None:
            if self.alive.pop(key, None) is not None:
                self.now -= size

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize(
    ("modes", "most"),
    [
        (("none",) * 3, 1.001),
        (("selective",) * 3, 1.10),
        (("full",) * 3, 1.34),
        (("full", "selective", "none"), 1.34),
    ],
)
def test_what_is_computed_beside_what_the_model_needs(modes, most):
    """torch counts three blocks of the real size; the ratio of all thirty is the count's."""

    def counted(num_layers):
        return step_flops(
            real_size.shape_of("t2v-1.3b", num_layers),
            TOKENS,
            rank=32,
            adapted=match_targets(linear_names(num_layers), PRESETS["attention"]),
            recompute=tuple(modes[i * 3 // num_layers] for i in range(num_layers)),
        )

    model = real_size.transformer(real_size.shape_of("t2v-1.3b", num_layers=3))
    set_activations(model, modes, compiled=False)
    with FlopCounterMode(display=False) as counter:
        real_size.loss(model, real_size.inputs(model, *FULL_SIZE)).backward()
    assert counter.get_total_flops() == pytest.approx(counted(3).total, rel=1e-6)
    assert counted(30).total / counted(30).model <= most


@pytest.mark.parametrize(("mode", "forwards"), [("none", 2), ("selective", 2), ("full", 4)])
def test_attention_is_computed_forward_once_unless_everything_is_recomputed(mode, forwards):
    shape = real_size.shape_of("t2v-1.3b", num_layers=2)
    model = real_size.transformer(shape)
    set_activations(model, (mode,) * 2, compiled=False)
    with Operators() as operators:
        real_size.loss(model, real_size.inputs(model, *FULL_SIZE)).backward()
    calls = operators.calls["aten::_scaled_dot_product_cudnn_attention"]
    assert calls == forwards * shape.num_layers


def _peak(variant: str, targets: str, modes, quantize: str) -> float:
    shape = real_size.shape_of(variant, num_layers=len(modes))
    model = real_size.transformer(shape, targets=targets, quantize=quantize)
    set_activations(model, modes, compiled=False)
    values = real_size.inputs(model, *FULL_SIZE)
    with Operators() as operators:
        for parameter in model.parameters():  # 8-bit weights are never the result of an operator
            operators.note(parameter.untyped_storage())
        real_size.loss(model, values).backward()
    return operators.peak


@pytest.mark.parametrize(
    ("variant", "targets", "quantize"),
    [("t2v-1.3b", "attention", "none"), ("t2v-1.3b", "attention+ffn", "none"),
     ("t2v-14b", "attention", "none"), ("t2v-14b", "attention+ffn", "int8"),
     ("i2v-14b", "attention", "none"), ("i2v-14b", "attention", "fp8")],
)  # fmt: skip
@pytest.mark.parametrize(
    "modes", [("none",) * 2, ("selective",) * 3, ("full",) * 3, ("selective", "none", "none")]
)
def test_the_peak_of_a_step_is_what_was_counted(variant, targets, quantize, modes):
    shape = real_size.shape_of(variant, num_layers=len(modes))
    counted = step_bytes(work_of(shape, targets, quantize), modes)
    # The optimizer's tensors are not here.
    expected = counted.kept + counted.working + counted.weights
    peak = _peak(variant, targets, modes, quantize)
    assert 0.88 * expected < peak < 1.005 * expected


@pytest.mark.parametrize(("variant", "most"), [("t2v-1.3b", 3.1), ("i2v-14b", 4.1)])
def test_a_block_keeps_what_was_counted(variant, most):
    shape = real_size.shape_of(variant, num_layers=2)
    unit = TOKENS * 2 * shape.width
    work = work_of(shape)
    assert block_bytes(work, "full") == unit
    assert block_bytes(work, "selective") / unit <= most
    for num_layers, expected in ((2, 2), (3, 3)):
        small = real_size.shape_of(variant, num_layers=num_layers)
        model = real_size.transformer(small)
        set_activations(model, ("none",) * num_layers, compiled=False)
        kept: dict[int, torch.UntypedStorage] = {}
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor, kept=kept, own=own):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = real_size.loss(model, real_size.inputs(model, *FULL_SIZE))
        total = sum(storage.nbytes() for storage in kept.values())
        del output
        assert total == pytest.approx(expected * block_bytes(work, "none"), rel=0.02)
