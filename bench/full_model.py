"""A model folder in the layout of Wan2.1-T2V-1.3B-Diffusers, with random weights.

The configurations are those of the released model, or with `tiny` those of the embedded micro
model. Weights are drawn and written a few MB at a time, so that 29 GB need little memory. The
tokenizer is made here: T5's special ids, bytes and letters, and syllables up to the size of the
vocabulary; its ids are not those of the real one.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wanlora.wan.variants import VARIANTS, Variant

RECIPE = 1
RECORD = "full_model.json"
SHARD_BYTES = 5_000_000_000
TINY_SHARD_BYTES = 200_000
VALUES_AT_ONCE = 1 << 22
ENDS = 1 << 16

Sizes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""


@dataclass(frozen=True)
class Part:
    """Weights of a part of the pipeline, and how its library names their files."""

    name: str
    stem: str
    config: Mapping[str, Any]
    sizes: Sizes
    shard_bytes: int


def build(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Write the model, or check that it is there; return its record.

    An interrupted build continues with the first missing file.
    """
    found = _complete(folder, tiny=tiny)
    if found:
        return found
    row = VARIANTS["micro" if tiny else "t2v-1.3b"]
    made = parts(row, tiny=tiny)
    for part in made:
        _write_part(folder / part.name, part)
    vocabulary = next(part.config["vocab_size"] for part in made if part.name == "text_encoder")
    _write_tokenizer(folder / "tokenizer", vocabulary, row.shape.num_text_tokens)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=row.defaults.shift
    ).save_pretrained(folder / "scheduler")
    classes = {
        "scheduler": ("diffusers", "UniPCMultistepScheduler"),
        "text_encoder": ("transformers", "UMT5EncoderModel"),
        "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
        "transformer": ("diffusers", "WanTransformer3DModel"),
        "vae": ("diffusers", "AutoencoderKLWan"),
    }
    head = {"_class_name": "WanPipeline", "_diffusers_version": diffusers.__version__}
    _write_json(folder / "model_index.json", {**head, **classes})
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != RECORD)
    record = {
        "recipe": RECIPE, "tiny": tiny, "variant": row.name,
        "bytes": {part.name: num_bytes(part.sizes) for part in made},
        "files": {str(file.relative_to(folder)): _ends(file) for file in files},
    }  # fmt: skip
    _write_json(folder / RECORD, record)
    return record


def _complete(folder: Path, *, tiny: bool) -> dict[str, Any] | None:
    """The record of a folder whose files have the recorded sizes, starts and ends."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        same = all(_ends(folder / name) == ends for name, ends in record["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return record if same and (record["recipe"], record["tiny"]) == (RECIPE, tiny) else None


def _ends(file: Path) -> list[Any]:
    """Size of a file, and a hash of its start and its end."""
    length = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(ENDS)
        opened.seek(max(0, length - ENDS))
        return [length, hashlib.sha256(start + opened.read(ENDS)).hexdigest()]


# --- configurations ---


def parts(row: Variant, *, tiny: bool) -> list[Part]:
    small_vae = {"base_dim": 16, "num_res_blocks": 1, "dim_mult": [1, 2, 2, 2]} if tiny else {}
    real_text = {"d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    text = UMT5Config(
        vocab_size=400 if tiny else 256384, d_model=row.shape.text_dim,
        feed_forward_proj="gated-gelu",
        **({"d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4} if tiny else real_text),
    )  # fmt: skip
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_layers=row.shape.num_layers, num_attention_heads=row.shape.num_attention_heads,
            attention_head_dim=row.shape.attention_head_dim, ffn_dim=row.shape.ffn_dim,
            text_dim=row.shape.text_dim, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        )  # fmt: skip
        vae = AutoencoderKLWan(
            latents_mean=list(row.vae.latents_mean),
            latents_std=list(row.vae.latents_std),
            **small_vae,
        )
        encoder = UMT5EncoderModel(text)
    shard_bytes = TINY_SHARD_BYTES if tiny else SHARD_BYTES
    # The released weights have one of the embedding's two names, and their configuration has
    # tie_word_embeddings false.
    text_config = {**text.to_dict(), "architectures": ["UMT5EncoderModel"], "dtype": "float32",
                   "tie_word_embeddings": False}  # fmt: skip
    in_text = {name: size for name, size in _sizes(encoder).items() if "embed_tokens" not in name}
    one_file = 1 << 62
    stem = "diffusion_pytorch_model"
    return [
        Part("vae", stem, _plain(vae), _sizes(vae), one_file),
        Part("text_encoder", "model", text_config, in_text, shard_bytes),
        Part("transformer", stem, _plain(transformer), _sizes(transformer),
             TINY_SHARD_BYTES * 20 if tiny else shard_bytes),
    ]  # fmt: skip


def _plain(model: AutoencoderKLWan | WanTransformer3DModel) -> dict[str, Any]:
    return dict(json.loads(model.to_json_string()))


def _sizes(model: torch.nn.Module) -> Sizes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- weights ---


def _write_part(folder: Path, part: Part) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = list(shards(part.sizes, part.shard_bytes))
    weight_map = {}
    for i, sizes in enumerate(files):
        several = f"-{i + 1:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file = folder / f"{part.stem}{several}.safetensors"
        weight_map |= dict.fromkeys(sizes, file.name)
        if not file.is_file():
            print(f"writing {file}, {num_bytes(sizes) / 1e9:.2f} GB", flush=True)
            _write_tensors(file, sizes, part.config)
    if len(files) > 1:
        total = {"total_size": num_bytes(part.sizes)}
        index = {"metadata": total, "weight_map": weight_map}
        _write_json(folder / f"{part.stem}.safetensors.index.json", index)
    _write_json(folder / "config.json", part.config)


def shards(sizes: Sizes, most_bytes: int) -> Iterator[Sizes]:
    """Split tensors in their order, as both libraries do when they save."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        if shard and num_bytes({**shard, name: size}) > most_bytes:
            yield shard
            shard = {}
        shard[name] = size
    yield shard


def num_bytes(sizes: Sizes) -> int:
    return sum(4 * math.prod(size) for size in sizes.values())


def _write_tensors(file: Path, sizes: Sizes, config: Mapping[str, Any]) -> None:
    """Write a file of float32 tensors; it appears under its name when it is complete."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in sizes.items():
        end = offset + 4 * math.prod(size)
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as opened:
        opened.write(len(head).to_bytes(8, "little") + head)
        for name, size in sizes.items():
            for values in _values(name, size, config):
                opened.write(memoryview(values).cast("B"))
    partial.replace(file)


def _values(
    name: str, size: tuple[int, ...], config: Mapping[str, Any]
) -> Iterator[np.ndarray[Any, Any]]:
    """Draw a tensor in pieces; spreads keep activations near 1, so that nothing overflows."""
    spread, constant = _spread(name, size, config)
    draws = np.random.Generator(
        np.random.SFC64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    )
    left = math.prod(size)
    while left:
        number = min(left, VALUES_AT_ONCE)
        left -= number
        if spread == 0:
            yield np.full(number, constant, dtype=np.float32)
        else:
            yield draws.standard_normal(number, dtype=np.float32) * np.float32(spread)


def _spread(name: str, size: tuple[int, ...], config: Mapping[str, Any]) -> tuple[float, float]:
    """Standard deviation of a tensor, and its value if that is 0."""
    if name.endswith(("bias", "gamma")) or "norm" in name:
        return 0, float(not name.endswith("bias"))
    if name == "shared.weight":
        return 1, 0
    fan_in = math.prod(size[1:]) if "scale_shift_table" not in name else size[-1]
    spread = 1 / math.sqrt(fan_in)
    if name.endswith("SelfAttention.q.weight"):  # T5 has no 1/sqrt(d_kv) in its attention
        spread /= math.sqrt(config["d_kv"])
    return spread, 0


# --- tokenizer ---


def _write_tokenizer(folder: Path, vocab_size: int, max_length: int) -> None:
    letters = [chr(code) for code in range(0x21, 0x7F)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0)]
    vocabulary += [(f"<0x{value:02X}>", -20.0) for value in range(256)]
    vocabulary += [("▁", -8.0)] + [(letter, -10.0) for letter in letters]
    syllables = [a + b for a, b in product("bcdfghjklmnprstvwxyz", "aeiou")]
    words = ("▁" + "".join(word) for n in (1, 2, 3) for word in product(syllables, repeat=n))
    vocabulary += [(word, -6.0) for word in islice(words, vocab_size - len(vocabulary))]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=max_length,
    ).save_pretrained(folder)  # fmt: skip


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
