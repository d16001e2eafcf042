"""Merged weights are written tensor by tensor, and safetensors reads them."""

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.numerics.test_memory import Operators
from wanlora.adapters.merge import write_merged
from wanlora.adapters.tensor_file import NAMES, write_tensors
from wanlora.adapters.updates import Update
from wanlora.wan.model_folder import PIPELINE, resolve


def test_safetensors_reads_every_type_and_shape_that_was_written(tmp_path):
    draws = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{number}": torch.randint(0, 2, size, generator=draws).to(dtype)
        for dtype, name in NAMES.items()
        for number, size in enumerate([(3, 5), (7,), (), (0, 2)])
    }
    tensors["transposed"] = torch.randn(4, 6, generator=draws).T
    sizes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    file = tmp_path / "a.safetensors"
    num_bytes = write_tensors(file, sizes, tensors.__getitem__)
    assert num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tolist() == tensor.tolist()
        assert found[name].data_ptr() % tensor.itemsize == 0
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_merging_keeps_a_few_tensors_in_memory_and_never_a_whole_file(tmp_path):
    base = resolve("micro", PIPELINE)
    [file] = (base / "transformer").glob("*.safetensors")
    weights = {n.removesuffix(".weight"): w for n, w in load_file(file).items() if w.dim() == 2}
    updates = {
        name: Update(torch.ones(2, w.shape[1]), torch.ones(w.shape[0], 2), 0.1)
        for name, w in weights.items()
        if name.startswith("blocks.")
    }
    with Operators() as operators:
        write_merged(base, {"transformer": updates}, tmp_path, dtype=torch.float32)
    merged = (tmp_path / "transformer" / file.name).stat().st_size
    largest = 8 * max(w.numel() for w in weights.values())  # float64
    assert merged > 6 * largest
    assert largest <= operators.peak <= 4 * largest < merged
