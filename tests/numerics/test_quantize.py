"""8-bit weights: their error, their gradient, what autograd keeps, and how they are loaded."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from functorch.compile import (
    aot_function,
    make_boxed_func,
    min_cut_rematerialization_partition,
    nop,
)
from torch.nn.functional import gelu

from tests.numerics.test_memory import Operators
from tests.support.models import random_tensors
from wanlora.adapters.file import LoraShape
from wanlora.adapters.lora import adapter_parameters, add_adapter
from wanlora.cost.memory import weight_bytes
from wanlora.errors import DeviceError, ModelError
from wanlora.wan.base_fingerprint import base_fingerprint
from wanlora.wan.blocks import set_activations
from wanlora.wan.quantize import (
    QuantizedLinear,
    _Product,
    dequantized,
    quantize_blocks,
    quantized,
    require_compilable,
)
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import VARIANTS

CPU = torch.device("cpu")
KINDS = ("int8", "fp8")


def linear(dtype=torch.float32, rows=24, columns=40) -> torch.nn.Linear:
    torch.manual_seed(0)
    made = torch.nn.Linear(columns, rows).requires_grad_(requires_grad=False)
    made.weight.mul_(torch.logspace(-3, 2, rows)[:, None])  # rows of very different sizes
    made.weight[3] = 0
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_values_are_the_nearest_ones_in_each_row(dtype):
    weight = linear(dtype).weight
    values, scale = quantized(weight, "int8")
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, dtype, (24, 1))
    exact, step = weight.double().numpy(), scale.double().numpy()
    assert np.array_equal(values.numpy(), np.rint(exact / step).clip(-127, 127))
    rounded = np.abs(exact).max(1) / 127
    assert np.allclose(step[:, 0], rounded, rtol=torch.finfo(dtype).eps, atol=2e-12)


def test_fp8_values_are_those_of_e4m3():
    """The oracle is the format itself: 4 bits of exponent, 3 of mantissa, largest value 448."""
    weight = linear().weight
    values, scale = quantized(weight, "fp8")
    found = values.view(torch.float8_e4m3fn).double().numpy()
    exact = (weight.double() / scale.double()).numpy()
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))), -6)
    spacing = 2.0 ** (exponent - 3)
    assert np.abs(found).max() == 448
    assert (np.abs(found - exact) <= spacing / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_and_its_gradient_are_those_of_the_dequantized_weight(kind, dtype):
    plain = linear(dtype)
    layer = QuantizedLinear(plain.weight, plain.bias, kind)
    plain.weight.copy_(dequantized(layer.weight, layer.scale, kind))
    x = torch.randn(2, 5, 40, dtype=dtype)
    results = []
    for module in (plain, layer):
        given = x.clone().requires_grad_()
        output = module(given)
        output.float().square().sum().backward()
        results.append((output.detach(), given.grad))
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_keeps_only_8_bits_of_a_weight(kind):
    plain = linear(rows=64, columns=64)
    layer = QuantizedLinear(plain.weight, plain.bias, kind)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        layer(torch.randn(3, 64, requires_grad=True))
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    assert {tensor.data_ptr() for tensor in kept} <= own
    assert {tensor.dtype for tensor in kept} == {torch.int8, torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_neither_does_a_compiled_graph_keep_more(kind):
    """torch's partitioner decides what a graph keeps; two layers, the first with an adapter."""
    values, scale = quantized(linear(torch.bfloat16, 64, 64).weight, kind)
    kept = []

    def note(graph, _inputs):
        results = graph.graph.find_nodes(op="output")[0].args[0]
        kept.extend(node.meta["val"] for node in results if node is not None)
        return make_boxed_func(graph.forward)

    def run(x, a, values, scale):
        hidden = gelu(_Product.apply(x, values, scale, None, kind) + x @ a)
        return _Product.apply(hidden, values, scale, None, kind)

    graph = aot_function(run, note, nop, min_cut_rematerialization_partition)
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    graph(x, torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True), values, scale)
    weights = [tensor.element_size() for tensor in kept if tensor.numel() == values.numel()]
    assert sorted(set(weights)) == [1, 2]
    assert weights.count(2) == 1, "more than the adapter"


KEPT_BY_INDUCTOR = """
import sys
import torch
from wanlora.wan.quantize import _Product, quantized

values, scale = quantized(torch.randn(256, 256, dtype=torch.bfloat16), sys.argv[1])

def run(x, a):
    hidden = torch.nn.functional.gelu(_Product.apply(x, values, scale, None, sys.argv[1]) + x @ a)
    return _Product.apply(hidden, values, scale, None, sys.argv[1])

x, a = (torch.randn(n, 256, dtype=torch.bfloat16, requires_grad=True) for n in (3, 256))
kept = []
with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
    torch.compile(run, fullgraph=True)(x, a)
print(sorted(str(t.dtype) for t in kept if t.numel() == values.numel()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nor_does_the_default_compiler(kind):
    """In a process without the checks of signatures, which the compiler cannot trace."""
    command = [sys.executable, "-c", KEPT_BY_INDUCTOR, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch.bfloat16', 'torch.int8']", "the adapter, and 8 bits"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_by_tensor_gives_the_bits_and_the_name_of_the_whole_model(micro_folder, kind, dtype):
    whole = load_transformer(micro_folder, dtype=dtype, device=CPU)
    loaded = load_transformer(micro_folder, dtype=dtype, device=CPU, quantize=kind)
    name = base_fingerprint(whole)
    assert base_fingerprint(loaded) == name
    quantize_blocks(whole, kind)
    assert base_fingerprint(whole) == name
    expected, found = whole.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    assert torch.equal(loaded.rope.freqs_cos, whole.rope.freqs_cos)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    shape = VARIANTS["micro"].shape
    taken = sum(p.numel() * p.element_size() for p in loaded.parameters())
    assert weight_bytes(shape, dtype.itemsize, kind) == taken


def test_files_that_do_not_fit_are_refused_with_the_name(micro_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    part = shutil.copytree(micro_folder / "transformer", tmp_path / "transformer")
    [file] = part.glob("*.safetensors")
    tensors = load_file(file)
    name = "blocks.0.attn1.to_q.weight"
    for changed in ({}, {name: tensors[name][:1].clone()}):
        save_file({k: v for k, v in tensors.items() if k != name} | changed, file)
        with pytest.raises(ModelError, match=name):
            load_transformer(tmp_path, dtype=torch.float32, device=CPU, quantize="int8")
    save_file(tensors | {"another": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="another"):
        load_transformer(tmp_path, dtype=torch.float32, device=CPU, quantize="int8")


class RealOperators(Operators):
    """Counts no storages of the meta device, which take no memory."""

    def note(self, storage) -> None:
        if storage.device.type != "meta":
            super().note(storage)


def test_loading_holds_the_result_and_at_most_one_shard_more(tmp_path):
    """Proportions of the 14B; 0.26 GB in fp32, in shards. Counts storages between operators."""
    model = WanTransformer3DModel(
        num_layers=4, num_attention_heads=8, attention_head_dim=128, ffn_dim=2752, text_dim=64,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    model.save_pretrained(tmp_path / "transformer", max_shard_size="30MB")
    with RealOperators() as operators:
        model = load_transformer(tmp_path, dtype=torch.bfloat16, device=CPU, quantize="int8")
    taken = sum(p.numel() * p.element_size() for p in model.parameters())
    shards = [file.stat().st_size for file in tmp_path.rglob("*.safetensors")]
    assert len(shards) > 3
    one_weight = 4 * 1024 * 2752
    in_bf16 = sum(shards) / 2
    assert operators.peak < taken + max(shards) + one_weight < in_bf16


def gradient_of(transformer, device=CPU) -> tuple[float, torch.Tensor]:
    """Loss and the adapter's gradient on fixed pairs; the adapter is not zero."""
    parameters = adapter_parameters(transformer)
    with torch.no_grad():
        for name, value in random_tensors(parameters, scale=0.02).items():
            parameters[name].copy_(value)
    torch.manual_seed(1)
    latents, noise = torch.randn(2, 4, 16, 3, 8, 12)
    sigmas = torch.tensor([0.2, 0.5, 0.8, 0.95])
    noisy = torch.lerp(latents, noise, sigmas.view(4, 1, 1, 1, 1))
    prompts = torch.randn(4, 32, transformer.config.text_dim) * 0.2
    output = transformer(noisy, sigmas * 1000, prompts, return_dict=False)[0]
    loss = (output - (noise - latents)).square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in parameters.values()])


@pytest.mark.parametrize(("kind", "angle", "error"), [("int8", 0.9990, 2e-3), ("fp8", 0.98, 2e-2)])
def test_the_adapters_gradient_is_that_of_the_full_base(micro_folder, kind, angle, error):
    found = []
    for quantize in ("none", kind):
        transformer = load_transformer(
            micro_folder, dtype=torch.float32, device=CPU, quantize=quantize
        )
        add_adapter(transformer, LoraShape(4, 4.0, "attention+ffn"), seed=0)
        found.append(gradient_of(transformer))
    (loss, gradient), (other_loss, other) = found
    assert not math.isclose(loss, other_loss, rel_tol=1e-7)
    assert other_loss == pytest.approx(loss, rel=error)
    assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) > angle


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_give_the_same_bits(micro_folder, mode):
    transformer = load_transformer(micro_folder, dtype=torch.float32, device=CPU, quantize="int8")
    parameters = add_adapter(transformer, LoraShape(4, 4.0, "attention+ffn"), seed=0)
    found = []
    for each in ("none", mode):
        set_activations(transformer, (each,) * len(transformer.blocks), compiled=False)
        found.append(gradient_of(transformer))
        for parameter in parameters.values():
            parameter.grad = None
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("kind", "capability", "refused"),
    [
        ("fp8", (8, 6), True),
        ("fp8", (8, 9), False),
        ("fp8", (9, 0), False),
        ("int8", (8, 0), False),
    ],
)
def test_fp8_is_refused_where_triton_has_no_type_for_it(monkeypatch, kind, capability, refused):
    """Answers of the driver are stood in for; a GPU's compiler decides the rest."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    if refused:
        with pytest.raises(DeviceError, match="int8"):
            require_compilable(kind, torch.device("cuda"))
    else:
        require_compilable(kind, torch.device("cuda"))
    require_compilable(kind, CPU)
