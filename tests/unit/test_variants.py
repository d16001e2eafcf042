"""Which model a folder is, and what is said when it cannot be used."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from wanlora.errors import DeviceError, ModelError
from wanlora.wan import device, model_folder, variants
from wanlora.wan.weights import file_sha256, weights_sha256


def write_config(folder: Path, part: str, **values) -> None:
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / part / "config.json").write_text(json.dumps(values))


def transformer_config(row: variants.Variant) -> dict:
    return {
        "num_layers": row.num_layers, "num_attention_heads": row.num_attention_heads,
        "attention_head_dim": row.attention_head_dim, "ffn_dim": row.ffn_dim,
        "text_dim": row.text_dim, "in_channels": row.z_dim, "out_channels": row.z_dim,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(variants.VARIANTS))
def test_a_transformer_configuration_names_its_variant(tmp_path, name):
    write_config(tmp_path, "transformer", **transformer_config(variants.VARIANTS[name]))
    assert variants.variant_of(tmp_path).name == name


def test_a_folder_with_only_encoders_is_the_first_variant_that_shares_them(tmp_path):
    row = variants.VARIANTS["t2v-14b"]
    write_config(
        tmp_path, "vae", z_dim=16, latents_mean=row.latents_mean, latents_std=row.latents_std
    )
    write_config(tmp_path, "text_encoder", d_model=4096)
    assert variants.variant_of(tmp_path).name == "t2v-1.3b"


def test_an_image_to_video_model_is_refused_with_the_rows(tmp_path):
    values = transformer_config(variants.VARIANTS["t2v-14b"]) | {"in_channels": 36}
    write_config(tmp_path, "transformer", **values)
    with pytest.raises(ModelError, match=r"in_channels=36(.|\n)*t2v-14b: .*in_channels=16"):
        variants.variant_of(tmp_path)


def test_a_model_of_two_transformers_is_refused_although_each_looks_like_the_14b(tmp_path):
    write_config(tmp_path, "transformer", **transformer_config(variants.VARIANTS["t2v-14b"]))
    index = tmp_path / "model_index.json"
    index.write_text('{"transformer_2": [null, null], "boundary_ratio": null}')  # Wan2.1, as saved
    assert variants.variant_of(tmp_path).name == "t2v-14b"
    for given in ({"transformer_2": ["diffusers", "WanTransformer3DModel"]},
                  {"boundary_ratio": 0.875}):  # fmt: skip
        index.write_text(json.dumps(given))
        with pytest.raises(ModelError, match=rf"two transformers.*{next(iter(given))}.*Wan2\.1"):
            variants.variant_of(tmp_path)


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
    assert (row.latents_mean, row.latents_std) == (
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
