"""Ways to keep frozen weights in 8 bits, on the embedded model: `python bench/quantize.py`.

For each way: the cosine of the adapter's gradient and the relative loss error against bf16, the
bytes that autograd keeps, the seconds of a step, and whether the blocks compile into one graph in
each recompute mode. torchao is measured if it is installed. `--block` takes a block of T2V-14B with
random weights instead. `--compile` takes minutes on a CPU.
"""

import argparse
import importlib.util
import json
import time

import models
import torch
from diffusers.hooks import apply_layerwise_casting

from wanlora.adapters.file import LoraShape
from wanlora.adapters.lora import add_adapter
from wanlora.wan.blocks import set_activations
from wanlora.wan.model_folder import TRANSFORMER, resolve
from wanlora.wan.quantize import quantize_blocks
from wanlora.wan.transformer import load_transformer

CPU, BF16 = torch.device("cpu"), torch.bfloat16
NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm)
MODES = ("none", "selective", "full")


def torchao(model, kind: str) -> None:
    from torchao import quantization  # noqa: PLC0415  (optional, and slow to import)

    name = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[kind]
    quantization.quantize_(model.blocks, getattr(quantization, name)())


def casting(model) -> None:
    for block in model.blocks:
        apply_layerwise_casting(
            block, torch.float8_e4m3fn, BF16, skip_modules_pattern=["norm"],
            skip_modules_classes=NORMS,
        )  # fmt: skip


WAYS = {
    "bf16": lambda _model: None,
    "ours int8": lambda model: quantize_blocks(model, "int8"),
    "ours fp8": lambda model: quantize_blocks(model, "fp8"),
    "layerwise casting fp8": casting,
}
if importlib.util.find_spec("torchao"):
    WAYS |= {
        "torchao int8": lambda model: torchao(model, "int8"),
        "torchao fp8": lambda model: torchao(model, "fp8"),
    }


def build(way: str, *, block: bool):
    """Model with an adapter of random values in bf16."""
    if block:
        shape = models.shape_of("t2v-14b", num_layers=1)
        model = models.transformer(shape, targets="^$", device=CPU)
    else:
        model = load_transformer(resolve("micro", TRANSFORMER), dtype=BF16, device=CPU)
    WAYS[way](model)
    parameters = add_adapter(model, LoraShape(16, 16.0, "attention+ffn"), seed=0)
    torch.manual_seed(1)
    for parameter in parameters.values():
        parameter.data = (0.02 * torch.randn(parameter.shape)).to(BF16)
    return model, parameters


def step(model, parameters) -> tuple[float, torch.Tensor]:
    """Loss and gradient on one fixed pair."""
    torch.manual_seed(2)
    latents, noise = torch.randn(2, 1, 16, 1, 8, 8)
    prompt = 0.2 * torch.randn(1, 64, model.config.text_dim)
    noisy = torch.lerp(latents, noise, 0.5).to(BF16)
    output = model(noisy, torch.tensor([500.0]), prompt.to(BF16), return_dict=False)[0]
    loss = (output.float() - (noise - latents)).square().mean()
    loss.backward()
    gradient = torch.cat([p.grad.double().flatten() for p in parameters.values()])
    for parameter in parameters.values():
        parameter.grad = None
    return loss.item(), gradient


def kept_bytes(model, parameters) -> int:
    """Bytes that autograd keeps, without the parameters and the parts of their subclasses."""
    own = set()
    for parameter in model.parameters():
        for part in (parameter, *(getattr(parameter, name, None) for name in ("qdata", "scale"))):
            if type(part) in {torch.Tensor, torch.nn.Parameter}:
                own.add(part.untyped_storage().data_ptr())
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        if type(tensor) in {torch.Tensor, torch.nn.Parameter}:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, parameters)
    return sum(storage.nbytes() for storage in kept.values())


def measure(way: str, reference, *, block: bool, compiled: bool) -> dict:
    model, parameters = build(way, block=block)
    layers = len(model.blocks)
    set_activations(model, ("none",) * layers, compiled=False)
    loss, gradient = step(model, parameters)
    expected_loss, expected = reference or (loss, gradient)
    started = time.perf_counter()
    step(model, parameters)
    row = {
        "way": way, "seconds": time.perf_counter() - started,
        "cosine": torch.nn.functional.cosine_similarity(gradient, expected, dim=0).item(),
        "loss_error": abs(loss / expected_loss - 1), "kept_bytes": kept_bytes(model, parameters),
        "adapter": sorted({str(p.dtype) for p in parameters.values()}), "compiled": {},
    }  # fmt: skip
    for mode in MODES if compiled else ():
        torch.compiler.reset()
        set_activations(model, (mode,) * layers, compiled=True)
        try:
            _, found = step(model, parameters)
            row["compiled"][mode] = torch.nn.functional.cosine_similarity(
                found, gradient, dim=0
            ).item()
        except Exception as error:  # noqa: BLE001  (a result: this way does not compile)
            row["compiled"][mode] = str(error).splitlines()[0][:200]
    row["result"] = (loss, gradient)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", action="store_true", help="a block of T2V-14B")
    parser.add_argument("--compile", action="store_true", help="also compile the blocks")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    reference = None
    for way in dict.fromkeys(["bf16", *options.ways]):
        row = measure(way, reference, block=options.block, compiled=options.compile)
        result = row.pop("result")
        reference = reference or result
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
