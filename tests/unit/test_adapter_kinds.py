"""Detection of adapters for text-to-video and for image-to-video models."""

import logging
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from wanlora.adapters.header import AdapterHeader
from wanlora.adapters.names import read_key
from wanlora.adapters.routing import GivenAdapter, route
from wanlora.adapters.targets import linear_names
from wanlora.adapters.trained_on import kind_of, log_unknown_kind
from wanlora.errors import AdapterError
from wanlora.wan.variants import VARIANTS

K_IMG = "lora_unet_blocks_0_cross_attn_k_img.lora_down.weight"
"""As musubi-tuner names it."""


def header(variant: str | None, *, expert: str | None = None, keys: tuple[str, ...] = ()):
    recorded = {"wanlora.variant": variant, "wanlora.model": f"org/{variant}"} if variant else {}
    recorded |= {"wanlora.expert": expert} if expert else {}
    return AdapterHeader(
        Path("person.safetensors"), {key: read_key(key) for key in keys}, recorded, expert
    )


def given(of: AdapterHeader, flag: str | None = None) -> GivenAdapter:
    return GivenAdapter(of, 1.0, flag)


@pytest.mark.parametrize(("trained", "used"), [*product(VARIANTS, VARIANTS)])
def test_every_pair_of_models_is_decided_by_name(trained, used):
    """An adapter runs on the variant that it was trained on; T2V and I2V never mix."""
    expert = "high" if VARIANTS[trained].boundary else None
    item = given(header(trained, expert=expert))
    if trained == used:
        assert route([item], VARIANTS[used], model="here/it") == [expert]
        return
    with pytest.raises(AdapterError) as refused:
        route([item], VARIANTS[used], model="here/it")
    assert {"person.safetensors", f"org/{trained}", "here/it", "--model"} <= {
        word.strip("(),.:") for word in str(refused.value).split()
    }
    if VARIANTS[trained].is_i2v != VARIANTS[used].is_i2v:
        assert "image-to-video model" in str(refused.value)
        assert "text-to-video model" in str(refused.value)


@pytest.mark.parametrize("used", VARIANTS)
def test_modules_that_read_the_image_are_for_models_that_have_them(used):
    item = given(header(None, keys=(K_IMG,)), "high" if VARIANTS[used].boundary else None)
    if VARIANTS[used].shape.image_dim:
        assert route([item], VARIANTS[used], model="x") == [None]
        return
    with pytest.raises(AdapterError, match=rf"blocks\.0\.attn2\.add_k_proj.*{used}"):
        route([item], VARIANTS[used], model="x")


@pytest.mark.parametrize(
    ("of", "used", "logged"),
    [
        (header(None), "i2v-a14b", True),
        (header(None), "t2v-14b", True),
        (header(None), "t2v-1.3b", False),  # there is no I2V model of its shape
        (header("i2v-a14b", expert="high"), "i2v-a14b", False),
        (header(None, keys=(K_IMG,)), "i2v-14b", False),
    ],
)
def test_a_file_that_does_not_show_its_kind_is_used_with_a_line(caplog, of, used, logged):
    caplog.set_level(logging.INFO)
    log_unknown_kind(of, VARIANTS[used], model="Wan-AI/X")
    assert bool(caplog.messages) is logged
    for message in caplog.messages:
        assert {"person.safetensors", "Wan-AI/X"} <= set(message.split())


def test_the_kind_is_that_of_the_record_or_of_the_modules():
    assert kind_of(header("t2v-a14b", expert="low")) == "T2V"
    assert kind_of(header("i2v-14b")) == "I2V"
    assert kind_of(header(None, keys=(K_IMG,))) == "I2V"
    assert kind_of(header(None)) is None
    assert kind_of(header("of-a-later-release")) is None


def test_linear_modules_of_an_image_model_are_those_that_diffusers_builds():
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=16, text_dim=8,
            in_channels=36, image_dim=8, added_kv_proj_dim=24,
        )  # fmt: skip
    linears = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    named = linear_names(2, reads_image=True)
    assert sorted(named) == sorted(linears)
