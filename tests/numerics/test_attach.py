"""An adapter in anybody's layout does to the transformer what it does in ours."""

import pytest
import torch

from tests.support import cli
from tests.support.models import random_tensors
from wanlora.adapters import attach
from wanlora.adapters.file import LoraShape, save_adapter
from wanlora.adapters.lora import adapter_parameters, add_adapter
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")


def output(folder, *adapters):
    transformer = load_transformer(folder, dtype=torch.float32, device=CPU)
    if adapters:
        attach.attach(transformer, [attach.read_scaled(str(adapter)) for adapter in adapters])
    with torch.no_grad():
        return transformer(
            hidden_states=torch.linspace(-1, 1, 16 * 2 * 16).view(1, 16, 2, 4, 4),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.linspace(-1, 1, 512 * 64).view(1, 512, 64),
            return_dict=False,
        )[0]


@pytest.fixture(scope="module")
def ours(micro_folder, tmp_path_factory):
    transformer = load_transformer(micro_folder, dtype=torch.float32, device=CPU)
    shape = LoraShape(rank=4, alpha=2.0)
    parameters = adapter_parameters(transformer) or add_adapter(transformer, shape, seed=0)
    folder = tmp_path_factory.mktemp("ours")
    return save_adapter(folder, random_tensors(parameters), shape, provenance={"model": "micro"})


@pytest.mark.parametrize("layout", ["diffusers", "peft", "comfyui", "kohya"])
def test_a_layout_does_what_the_original_does(ours, layout, micro_folder, tmp_path):
    theirs = tmp_path / ("theirs" if layout == "peft" else "theirs.safetensors")
    result = cli.invoke("export", "--adapter", ours, "--format", layout, "--output", theirs)
    assert result.exit_code == 0, result.output
    base, expected = output(micro_folder), output(micro_folder, ours)
    assert not torch.allclose(base, expected, atol=1e-3)
    torch.testing.assert_close(output(micro_folder, theirs), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        output(micro_folder, f"{theirs}=0.5"), output(micro_folder, f"{ours}=0.5"),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
