"""An encoder is the same if its tensors and tokens are, and another if any of them differs."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.support.models import temporary_copy
from wanlora.core.fingerprint import fingerprint
from wanlora.errors import ConfigError, ModelError
from wanlora.wan import encoders, identity, provenance
from wanlora.wan.model_folder import ENCODERS, resolve
from wanlora.wan.variants import variant_of
from wanlora.wan.weights import file_sha256, weight_files, weights_sha256

BF16, FP32 = torch.bfloat16, torch.float32
TEXT, VAE = identity.text_encoder_sha256, identity.vae_sha256


@pytest.fixture
def model(micro_folder, tmp_path) -> Path:
    return temporary_copy(micro_folder, tmp_path / "model")


def tensors_of(part: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in weight_files(part) for name, value in load_file(file).items()}


def repack(part: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1) -> None:
    """Write the tensors of a part anew, in as many files."""
    stem = "model" if part.name == "text_encoder" else "diffusion_pytorch_model"
    for file in part.glob("*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, part / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    files = {name: f"{stem}-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        own = {name: tensors[name] for name in names if files[name] == file}
        save_file(own, part / file, metadata={"format": "pt"})
    (part / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize(("part", "digest"), [("vae", VAE), ("text_encoder", TEXT)])
def test_another_packing_of_equal_tensors_is_the_same_encoder(model, part, digest):
    wanted = {dtype: digest(model, dtype, {}) for dtype in (BF16, FP32)}
    tensors = tensors_of(model / part)
    for shards in (1, 2, 5):
        repack(model / part, tensors, shards=shards)
        assert {dtype: digest(model, dtype, {}) for dtype in wanted} == wanted
    repack(model / part, {name: value.to(BF16) for name, value in tensors.items()})
    assert digest(model, BF16, {}) == wanted[BF16]
    assert digest(model, FP32, {}) != wanted[FP32]  # float32 does not round to bfloat16 by chance
    repack(model / part, {name: value.to(BF16).float() for name, value in tensors.items()})
    rounded = digest(model, FP32, {})
    repack(model / part, {name: value.to(BF16) for name, value in tensors.items()})
    assert digest(model, FP32, {}) == rounded


def test_one_value_of_any_tensor_that_is_used_is_another_encoder(model):
    tensors = tensors_of(model / "vae")
    used = [name for name in tensors if name.startswith(("encoder.", "quant_conv."))]
    assert 20 < len(used) < len(tensors)
    vae = VAE(model, FP32, {})
    for name, same in ((used[0], False), (used[-1], False), ("decoder.conv_in.weight", True)):
        changed = tensors[name].clone()
        changed.view(-1)[-1] += 1
        repack(model / "vae", tensors | {name: changed})
        assert (VAE(model, FP32, {}) == vae) is same, name


def test_rows_of_a_large_tensor_are_hashed_apart_and_all_count(model, monkeypatch):
    monkeypatch.setattr(identity, "_PIECE_VALUES", 64)
    tensors = tensors_of(model / "vae")
    before = VAE(model, FP32, {})
    for index in (0, 1000, -1):
        changed = tensors["encoder.conv_in.weight"].clone()
        changed.view(-1)[index] += 1
        repack(model / "vae", tensors | {"encoder.conv_in.weight": changed})
        assert VAE(model, FP32, {}) != before


def test_the_embedding_has_two_names_and_one_value(model):
    tensors = tensors_of(model / "text_encoder")
    wanted = TEXT(model, BF16, {})
    shared = tensors.pop("shared.weight")
    other = "encoder.embed_tokens.weight"
    for packing in ({other: shared}, {"shared.weight": shared, other: shared.clone()}):
        repack(model / "text_encoder", tensors | packing)
        assert TEXT(model, BF16, {}) == wanted
    repack(model / "text_encoder", tensors | {"shared.weight": shared, other: shared + 1})
    with pytest.raises(ModelError, match=r"two different tensors.*shared\.weight"):
        TEXT(model, BF16, {})


def test_a_digest_is_remembered_until_a_file_has_another_size_or_time(model, monkeypatch):
    memo: identity.Memo = {}
    first = VAE(model, FP32, memo)
    memo = identity.parse_memo(identity.memo_document(memo))
    monkeypatch.setattr(identity, "_pieces", lambda *_: pytest.fail("read again"))
    assert VAE(model, FP32, memo) == first
    monkeypatch.undo()
    [file] = weight_files(model / "vae")
    os.utime(file, ns=(1, 1))
    memo = {name: (stamp, "old") for name, (stamp, _) in memo.items()}
    assert VAE(model, FP32, memo) == first
    for damaged in (b"{", b"[]", b'{"a": 1}'):
        assert identity.parse_memo(damaged) == {}


def test_weights_in_two_packings_side_by_side_are_refused(model):
    part = model / "text_encoder"
    save_file(tensors_of(part), part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json and model\.safetensors"):
        resolve(str(model), ENCODERS)


# What transformers and diffusers take from a configuration, with weights that fit all the same.
@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_encoder", "dense_act_fn", "relu"),
        ("text_encoder", "feed_forward_proj", "gated-silu"),
        ("text_encoder", "layer_norm_epsilon", 1e-5),
        ("text_encoder", "relative_attention_max_distance", 64),
        ("text_encoder", "is_decoder", True),
        ("text_encoder", "quantization_config", {"quant_method": "bitsandbytes"}),
        ("text_encoder", "transformers_weights", "other.safetensors"),
        ("vae", "temperal_downsample", [True, True, False]),
        ("vae", "is_residual", True),
        ("vae", "patch_size", 2),
    ],
)
def test_a_configuration_that_changes_the_output_is_refused(model, part, field, value):
    file = model / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ModelError) as caught:
        variant_of(model)
    assert f"{part}.{field}=" in str(caught.value)


def text_fingerprint(model: Path) -> str:
    return fingerprint(
        provenance.text_provenance(model, dtype=BF16, store_dtype="float16", memo={})
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"padding_side": "left"},
        {"truncation_side": "left"},
        {"added_tokens_decoder": {"399": {
            "content": "walking", "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }}},
    ],
)  # fmt: skip
def test_tokenizer_settings_that_change_ids_are_another_encoder(model, settings):
    before = text_fingerprint(model)
    file = model / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert text_fingerprint(model) != before
    plain = identity.is_plain(model, lambda: encoders.load_tokenizer(model), encoders.tokenize)
    assert not plain


def test_a_tokenizer_saved_again_is_the_same(model):
    before = text_fingerprint(model)
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    file = model / "tokenizer" / "tokenizer.json"
    old = file_sha256(file)
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))
    assert file_sha256(file) != old
    assert text_fingerprint(model) == before
    tokenizer.save_pretrained(model / "tokenizer")
    assert text_fingerprint(model) == before


def test_the_record_of_0_1_0_is_recognised_by_its_hashes_and_nothing_else(model):
    new = provenance.text_provenance(model, dtype=BF16, store_dtype="float16", memo={})
    common = {k: v for k, v in new.items() if k != "recipe" and not k.endswith("_sha256")}
    old = common | {
        "text_encoder_sha256": weights_sha256(model / "text_encoder"),
        "tokenizer_sha256": file_sha256(model / "tokenizer" / "tokenizer.json"),
    }
    hashed: list[Path] = []

    def hash_file(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    def found(*stored: dict) -> object:
        return provenance.recorded_by_0_1_0(model, new, stored, hash_file)

    assert found() is None
    assert found(old | {"compute_dtype": "float32"}, new) is None
    assert not hashed  # no file is read for a record that cannot be the one
    assert found(old | {"tokenizer_sha256": "0" * 64}) is None
    assert found(old | {"cleaning_revision": 0}, old) == old
    file = model / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    assert found(old) is None  # 0.1.0 did not record this setting


@pytest.mark.parametrize(
    ("device", "name", "value", "refused"),
    [
        ("cuda", "NVIDIA_TF32_OVERRIDE", "1", True),
        ("cuda", "NVIDIA_TF32_OVERRIDE", "0", True),
        ("cpu", "NVIDIA_TF32_OVERRIDE", "1", False),
        ("cpu", "ONEDNN_DEFAULT_FPMATH_MODE", "BF16", True),
        ("cpu", "ONEDNN_DEFAULT_FPMATH_MODE", "STRICT", False),
    ],
)
def test_arithmetic_that_is_changed_from_outside_is_refused(
    monkeypatch, device, name, value, refused
):
    monkeypatch.setenv(name, value)
    if not refused:
        provenance.require_own_arithmetic(torch.device(device))
        return
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        provenance.require_own_arithmetic(torch.device(device))
