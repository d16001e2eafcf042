"""Which model a folder is, and what is said when it cannot be used."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.support.i2v import i2v_folder
from wanlora.config.estimate import VariantName
from wanlora.core.buckets import Bucket
from wanlora.errors import ConfigError, DeviceError, ModelError
from wanlora.wan import device, model_folder, variants
from wanlora.wan.weights import file_sha256, weights_sha256


def write_config(folder: Path, part: str, **values) -> None:
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / part / "config.json").write_text(json.dumps(values))


def transformer_config(row: variants.Variant) -> dict:
    return {
        "num_layers": row.shape.num_layers, "num_attention_heads": row.shape.num_attention_heads,
        "attention_head_dim": row.shape.attention_head_dim, "ffn_dim": row.shape.ffn_dim,
        "text_dim": row.shape.text_dim, "in_channels": row.shape.in_channels,
        "out_channels": row.shape.out_channels, "image_dim": row.shape.image_dim,
        "added_kv_proj_dim": row.shape.width if row.shape.image_dim else None,
    }  # fmt: skip


def write_model(folder: Path, name: str, parts=("transformer",), **index) -> Path:
    """The transformers' configurations of a row, and model_index.json if there are values."""
    for part in parts:
        write_config(folder, part, **transformer_config(variants.VARIANTS[name]))
    if index:
        pipeline = "WanImageToVideoPipeline" if variants.VARIANTS[name].is_i2v else "WanPipeline"
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline} | index))
    return folder


BOTH = ("transformer", "transformer_2")
PAIR = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
SINGLE = {"transformer_2": [None, None], "boundary_ratio": None}  # as diffusers saves Wan2.1


@pytest.mark.parametrize("name", list(variants.VARIANTS))
def test_a_folder_is_recognised_by_its_shape_and_its_number_of_transformers(tmp_path, name):
    boundary = variants.VARIANTS[name].boundary
    index = PAIR | {"boundary_ratio": boundary} if boundary else SINGLE
    write_model(tmp_path, name, BOTH if boundary else BOTH[:1], **index)
    assert variants.variant_of(tmp_path).name == name


def test_every_row_of_a_model_that_users_have_can_be_named_to_estimate():
    rows = {name for name, row in variants.VARIANTS.items() if not row.is_micro}
    assert set(get_args(VariantName)) == {*rows, "micro"}


@pytest.mark.parametrize("part", BOTH)
def test_one_downloaded_expert_is_known_by_the_index_of_its_model(tmp_path, part):
    assert variants.variant_of(write_model(tmp_path, "t2v-a14b", (part,), **PAIR)).boundary == 0.875


def test_one_expert_without_an_index_is_told_by_its_sub_folder_or_by_the_user(tmp_path):
    high, low = (write_model(tmp_path / part, "t2v-14b", (part,)) for part in BOTH)
    assert variants.variant_of(low).name == "t2v-a14b"
    assert variants.variant_of(high).name == "t2v-14b"
    assert variants.variant_of(high, "high").name == "t2v-a14b"
    small = write_model(tmp_path / "small", "t2v-1.3b")
    assert variants.variant_of(small, "high").name == "t2v-1.3b"  # there is no such pair
    said_to_have_one = write_model(tmp_path / "one", "t2v-14b", **SINGLE)
    assert variants.variant_of(said_to_have_one, "high").name == "t2v-14b"


@pytest.mark.parametrize(
    ("index", "named"),
    [
        (PAIR | {"boundary_ratio": 0.9}, "boundary_ratio=0.9"),
        (PAIR | {"boundary_ratio": None}, "boundary_ratio=None"),
        (SINGLE | {"boundary_ratio": 0.875}, "transformer_2=False"),
    ],
)
def test_another_boundary_than_the_rows_is_refused_with_both(tmp_path, index, named):
    write_model(tmp_path, "t2v-a14b", BOTH, **index)
    with pytest.raises(ModelError) as caught:
        variants.variant_of(tmp_path)
    assert named in str(caught.value)
    assert "t2v-a14b: " in str(caught.value)
    assert "boundary_ratio=0.875" in str(caught.value)


def test_two_transformers_that_differ_are_refused_with_the_fields(tmp_path):
    write_model(tmp_path, "t2v-a14b", **PAIR)
    write_model(tmp_path, "t2v-1.3b", ("transformer_2",))
    with pytest.raises(ModelError, match=r"transformer\.num_layers=40 and 30"):
        variants.variant_of(tmp_path)


def test_a_part_is_asked_for_by_its_expert_exactly_if_there_are_two():
    pair, one = variants.VARIANTS["t2v-a14b"], variants.VARIANTS["t2v-14b"]
    high, low = pair.part("high"), pair.part("low")
    assert pair.transformers == (high, low)
    assert (high.subfolder, high.sigmas) == ("transformer", (0.875, 1.0))
    assert (low.subfolder, low.sigmas) == ("transformer_2", (0.0, 0.875))
    assert one.part(None).sigmas == (0.0, 1.0)
    with pytest.raises(ModelError) as caught:
        pair.part(None)
    for named in ("--expert high", "0.875 to 1", "--expert low", "0 to 0.875"):
        assert named in str(caught.value)
    with pytest.raises(ModelError, match=r"t2v-14b.*--expert low"):
        one.part("low")


def test_the_guidance_of_an_expert_is_its_own_then_the_common_one_then_the_variants():
    pair, one = variants.VARIANTS["t2v-a14b"], variants.VARIANTS["t2v-14b"]
    assert pair.guidance_scales(None, None) == (4.0, 3.0)
    assert pair.guidance_scales(6.0, None) == (6.0, 6.0)
    assert pair.guidance_scales(None, 2.0) == (4.0, 2.0)
    assert pair.guidance_scales(0.0, 0.0) == (0.0, 0.0)
    assert one.guidance_scales(None, None) == (5.0,)
    with pytest.raises(ConfigError, match=r"t2v-14b.*--guidance-scale-low"):
        one.guidance_scales(5.0, 3.0)


@pytest.mark.parametrize("name", list(variants.VARIANTS))
def test_the_ranges_of_a_models_transformers_meet_and_cover_all_noise_levels(name):
    ranges = [part.sigmas for part in variants.VARIANTS[name].transformers]
    assert [ranges[-1][0], ranges[0][1]] == [0.0, 1.0]
    assert all(high[0] == low[1] for high, low in pairwise(ranges))


@pytest.mark.parametrize(
    ("size", "shift"),
    [((81, 480, 832), 3), ((1, 512, 512), 3), ((81, 544, 960), 3), ((81, 720, 1280), 5),
     ((1, 1280, 720), 5), ((49, 704, 1280), 5)],
)  # fmt: skip
def test_the_shift_is_that_of_the_nearer_released_size(size, shift):
    assert variants.VARIANTS["t2v-14b"].shift_of(Bucket(*size)) == shift
    assert variants.VARIANTS["i2v-14b"].shift_of(Bucket(*size)) == shift
    assert variants.VARIANTS["t2v-a14b"].shift_of(Bucket(*size)) == 12
    assert variants.VARIANTS["i2v-a14b"].shift_of(Bucket(*size)) == 5


def test_a_folder_with_only_encoders_is_the_first_variant_that_shares_them(tmp_path):
    vae = variants.VARIANTS["t2v-14b"].vae
    write_config(
        tmp_path, "vae", z_dim=16, latents_mean=vae.latents_mean, latents_std=vae.latents_std
    )
    write_config(tmp_path, "text_encoder", d_model=4096)
    assert variants.variant_of(tmp_path).name == "t2v-1.3b"
    write_model(tmp_path, "t2v-a14b", (), **PAIR)
    assert variants.variant_of(tmp_path).name == "t2v-a14b"


@pytest.mark.parametrize(
    ("changed", "index", "named"),
    [
        ({"in_channels": 36, "num_layers": 30}, {}, "Wan-Fun-InP.*in_channels=36"),
        ({"in_channels": 36, "pos_embed_seq_len": 514}, {}, "FLF2V.*pos_embed_seq_len=514"),
        ({"in_channels": 48}, {}, "Fun-Control"),
        ({"in_channels": 48, "out_channels": 48}, {}, "TI2V-5B"),
        ({"_class_name": "WanVACETransformer3DModel"}, {}, "VACE.*transformer/config.json"),
        ({"_class_name": "WanAnimateTransformer3DModel"}, {}, "Animate"),
        ({}, {"_class_name": "WanVACEPipeline"}, "VACE.*model_index.json"),
        ({}, {"_class_name": "SomethingElse"}, "SomethingElse"),
    ],
)
def test_a_model_that_is_not_supported_is_refused_by_name(tmp_path, changed, index, named):
    write_model(tmp_path, "t2v-14b", **index)
    values = transformer_config(variants.VARIANTS["t2v-14b"]) | changed
    write_config(tmp_path, "transformer", **values)
    with pytest.raises(ModelError, match=named) as caught:
        variants.variant_of(tmp_path)
    assert "not support" in str(caught.value)
    assert "t2v-a14b" in str(caught.value)


I2V = {"_class_name": "WanImageToVideoPipeline"}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("t2v-14b", ("latents", "text")),
        ("i2v-a14b", ("latents", "text", "cond_latents")),
        ("i2v-14b", ("latents", "text", "cond_latents", "clip_vision")),
        ("micro-i2v", ("latents", "text", "cond_latents")),
    ],
)
def test_a_variant_names_the_kinds_of_encodings_that_it_is_trained_on(name, kinds):
    row = variants.VARIANTS[name]
    assert row.kinds == kinds
    assert row.is_i2v == ("cond_latents" in kinds)
    assert row.shape.num_image_tokens == (257 if "clip_vision" in kinds else 0)


def test_an_image_to_video_transformer_without_an_index_is_known_by_its_image_embedder(tmp_path):
    with_clip, without = (write_model(tmp_path / name, name) for name in ("i2v-14b", "i2v-a14b"))
    assert variants.variant_of(with_clip).name == "i2v-14b"
    assert variants.variant_of(without).name == "i2v-a14b"
    assert variants.variant_of(without, "high").name == "i2v-a14b"


@pytest.mark.parametrize(
    ("name", "index"), [("i2v-14b", {"_class_name": "WanPipeline"}), ("t2v-14b", I2V)]
)
def test_a_transformer_beside_the_index_of_another_task_is_refused(tmp_path, name, index):
    write_model(tmp_path, name, **SINGLE, **index)
    with pytest.raises(ModelError) as caught:
        variants.variant_of(tmp_path)
    assert f"model_index._class_name={index['_class_name']}" in str(caught.value)


def test_encoders_with_the_index_of_an_image_to_video_model_are_of_such_a_model(tmp_path):
    write_config(tmp_path, "text_encoder", d_model=4096)
    write_model(tmp_path, "i2v-14b", (), **SINGLE)
    write_config(tmp_path, "image_encoder", hidden_size=1280, hidden_act="gelu")
    assert variants.variant_of(tmp_path).name == "i2v-14b"
    write_config(tmp_path, "image_encoder", hidden_size=1280, hidden_act="quick_gelu")
    with pytest.raises(ModelError, match=r"image_encoder\.hidden_act=quick_gelu"):
        variants.variant_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("micro-i2v", {"clip": False}),
        ("micro-i2v-clip", {"clip": True}),
        ("micro-i2v-a14b", {"clip": False, "experts": True}),
    ],
)
def test_a_whole_image_to_video_folder_has_the_parts_that_its_row_says(tmp_path, name, options):
    folder = i2v_folder(tmp_path / "model", **options)
    row = variants.variant_of(folder)
    assert row.name == name
    parts = model_folder.pipeline_of(folder)
    assert ("image_encoder" in parts, "image_processor" in parts) == (options["clip"],) * 2
    assert ("transformer_2" in parts) == (row.boundary is not None)
    assert model_folder.resolve(str(folder), parts) == folder.resolve()
    if options["clip"]:
        (folder / "image_processor" / "preprocessor_config.json").unlink()
        with pytest.raises(ModelError, match=r"image_processor/preprocessor_config\.json"):
            model_folder.resolve(str(folder), parts)


def test_a_transformer_beside_the_wrong_vae_is_refused(tmp_path):
    row = variants.VARIANTS["t2v-1.3b"]
    write_config(tmp_path, "transformer", **transformer_config(row))
    write_config(tmp_path, "vae", z_dim=48, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    with pytest.raises(ModelError, match=r"vae\.z_dim=48"):
        variants.variant_of(tmp_path)


def test_latent_statistics_are_those_of_diffusers():
    with torch.device("meta"):
        config = AutoencoderKLWan().config
    row = variants.VARIANTS["t2v-1.3b"]
    assert (row.vae.latents_mean, row.vae.latents_std) == (
        tuple(config.latents_mean), tuple(config.latents_std),
    )  # fmt: skip


def test_the_micro_folder_is_the_micro_variant(micro_folder):
    assert variants.variant_of(micro_folder) == variants.VARIANTS["micro"]
    assert model_folder.resolve(str(micro_folder), model_folder.PIPELINE) == micro_folder


def test_the_micro_model_is_as_small_as_it_must_be_to_ship(micro_folder):
    size = sum(path.stat().st_size for path in micro_folder.rglob("*") if path.is_file())
    assert size <= 6e6


def test_the_micro_models_card_describes_the_weights_that_are_there(micro_folder):
    card = (micro_folder / "README.md").read_text()
    for part in ("vae", "text_encoder", "transformer"):
        assert weights_sha256(micro_folder / part) in card


def test_the_micro_text_encoder_is_saved_as_the_released_one_is(micro_folder):
    part = micro_folder / "text_encoder"
    index = json.loads((part / "model.safetensors.index.json").read_text())
    assert "shared.weight" in index["weight_map"]
    assert not any("embed_tokens" in name for name in index["weight_map"])
    assert len(set(index["weight_map"].values())) > 1
    assert json.loads((part / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("remove", "named"),
    [
        ("transformer", "transformer/"),
        ("transformer/config.json", "transformer/config.json"),
        ("transformer/diffusion_pytorch_model.safetensors", "transformer/*.safetensors"),
        ("text_encoder/model-00002-of-", "text_encoder/model-00002-of-"),
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer.json"),
    ],
)
def test_an_incomplete_folder_is_refused_naming_what_is_missing(
    micro_folder, tmp_path, remove, named
):
    copy = tmp_path / "model"
    shutil.copytree(micro_folder, copy)
    [path] = copy.glob(f"{remove}*") if remove.endswith("-of-") else [copy / remove]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match="incomplete") as caught:
        model_folder.resolve(str(copy), model_folder.PIPELINE)
    assert named in str(caught.value)


def test_only_the_parts_asked_for_must_be_there(micro_folder, tmp_path):
    shutil.copytree(micro_folder / "transformer", tmp_path / "transformer")
    assert model_folder.resolve(str(tmp_path), model_folder.TRANSFORMER) == tmp_path.resolve()
    assert variants.variant_of(tmp_path).name == "micro"


@pytest.mark.parametrize("model", ["./missing", "/no/such/folder", "Micro"])
def test_a_missing_folder_is_refused(model):
    with pytest.raises(ModelError, match=f"at {model}"):
        model_folder.resolve(model, model_folder.TRANSFORMER)


def test_a_hub_id_without_network_names_the_download_command(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        model_folder.resolve("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", model_folder.ENCODERS)
    assert (
        "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --include model_index.json 'vae/*' "
        "'text_encoder/*' 'tokenizer/*' --local-dir"
    ) in str(caught.value)


def test_resolving_micro_imports_no_encoder():
    """Training resolves the micro model too."""
    code = (
        "import sys; from wanlora.wan import model_folder; "
        "model_folder.resolve('micro', model_folder.TRANSFORMER); "
        "print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "False"]


def test_sharded_weights_hash_by_content_not_by_path(micro_folder, tmp_path):
    shutil.copytree(micro_folder / "text_encoder", tmp_path / "copy")
    asked = []

    def remembering(path: Path) -> str:
        asked.append(path.name)
        return file_sha256(path)

    digest = weights_sha256(tmp_path / "copy", remembering)
    assert digest == weights_sha256(micro_folder / "text_encoder")
    assert asked == sorted(asked)
    assert len(asked) > 1


def test_a_real_model_is_refused_without_accelerator_unless_the_cpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"driver .*torch .* --device cpu"):
        device.select_device("auto", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert device.select_device("cpu", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers").type == "cpu"
    assert device.select_device("auto", "micro").type == "cpu"


def test_a_local_copy_of_the_micro_model_may_run_on_a_cpu(monkeypatch, micro_folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.select_device("auto", str(micro_folder)).type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_does_not_work_is_refused_not_replaced():
    with pytest.raises(DeviceError, match="device cuda"):
        device.select_device("cuda", "micro")
