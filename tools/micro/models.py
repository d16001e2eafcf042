"""Build the embedded model: the real classes at a small size.

Owns: sizes, vocabulary and initial weights of its parts, and the folder they are saved as. Saved as
the released model is, a WanPipeline folder, the text encoder fp32 in shards with only
`shared.weight` and `tie_word_embeddings` false; VAE and transformer are rounded to fp16, for size.
The text encoder is not trained: what its random weights say of a caption is enough to tell it from
another, and training it along with the DiT gained nothing.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wanlora.core.rng import Stream, normal
from wanlora.wan.encoders import TextEncoder
from wanlora.wan.model_folder import MICRO
from wanlora.wan.variants import VARIANTS

ROW = VARIANTS[MICRO]
VOCAB_SIZE = 400
TEXT_SHARD_SIZE = "150KB"
"""Small, so that the text encoder is saved in several shards as the released one is."""

_WORDS = """
a an the is on in of and with to from at by one two person people man woman child dog cat ball car
red green blue yellow cyan white black purple orange gray pink brown circle square triangle striped
star stick figure moving left right up down walking waving jumping sitting clapping running dancing
standing background video slowly quickly fast slow large small their hands realistic showing
"""
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-"


def make_vae() -> AutoencoderKLWan:
    """Build the VAE: x4 in time and x8 in space like the real one, a hundredth of its size."""
    return AutoencoderKLWan(
        base_dim=16, z_dim=ROW.vae.z_dim, dim_mult=[1, 2, 2, 2], num_res_blocks=1
    )


def make_transformer() -> WanTransformer3DModel:
    """Build the DiT, with the initial weights that diffusers gives it."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=ROW.shape.num_attention_heads,
        attention_head_dim=ROW.shape.attention_head_dim,
        in_channels=ROW.vae.z_dim,
        out_channels=ROW.vae.z_dim,
        text_dim=ROW.shape.text_dim,
        freq_dim=256,
        ffn_dim=ROW.shape.ffn_dim,
        num_layers=ROW.shape.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def make_text_encoder(seed: int) -> TextEncoder:
    """Build the text encoder with its tokenizer, with the initial spreads of UMT5."""
    config = UMT5Config(
        vocab_size=VOCAB_SIZE,
        d_model=ROW.shape.text_dim,
        d_kv=16,
        d_ff=2 * ROW.shape.text_dim,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    model = UMT5EncoderModel(config).eval()
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "norm" in name:
            continue
        spread = 1 / math.sqrt(parameter.shape[-1])
        if name.endswith("shared.weight"):
            spread = 1.0
        elif name.endswith(".q.weight"):  # T5 has no 1/sqrt(d_kv) in its attention: it is here
            spread /= math.sqrt(config.d_kv)
        values = normal(seed, Stream.INIT, 0, index, tuple(parameter.shape))
        parameter.data.copy_(torch.from_numpy(values * np.float32(spread)))
    return TextEncoder(make_tokenizer(), model)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a Unigram tokenizer of whole words, letters and bytes: it has a token for any text.

    Ids as in T5: 0 `<pad>`, 1 `</s>` (appended), 2 `<unk>` (never needed: bytes stand in).
    """
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0)]
    vocabulary += [(f"<0x{value:02X}>", -20.0) for value in range(256)]
    vocabulary += [("▁", -8.0)] + [(character, -10.0) for character in _CHARACTERS]
    vocabulary += [(f"▁{word}", -4.0) for word in _WORDS.split()]
    assert len(vocabulary) <= VOCAB_SIZE, len(vocabulary)
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106  (not a password)
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_max_length=ROW.shape.num_text_tokens,
    )


def save(
    folder: Path, vae: AutoencoderKLWan, transformer: WanTransformer3DModel, text: TextEncoder
) -> None:
    """Write a WanPipeline folder."""
    save_rounded(vae, folder / "vae")
    save_rounded(transformer, folder / "transformer")
    text.model.save_pretrained(folder / "text_encoder", max_shard_size=TEXT_SHARD_SIZE)
    _untie(folder / "text_encoder" / "config.json")
    text.tokenizer.backend_tokenizer.no_truncation()  # what it was last asked for would be saved
    text.tokenizer.backend_tokenizer.no_padding()
    text.tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=ROW.defaults.shift
    )
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": scheduler.config["_diffusers_version"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _make_readable(folder)


def save_rounded(model: AutoencoderKLWan | WanTransformer3DModel, folder: Path) -> None:
    """Round the weights to fp16 in place, and write them with their configuration."""
    for parameter in model.parameters():  # by hand: `.to` leaves what diffusers keeps in fp32
        parameter.data = parameter.data.half()
    model.save_pretrained(folder)
    _make_readable(folder)


def _make_readable(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes them private


def set_statistics(vae: AutoencoderKLWan, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write the raw latents' mean and spread per channel into the VAE's configuration."""
    rounded = {
        "latents_mean": [round(float(value), 4) for value in mean],
        "latents_std": [round(float(value), 4) for value in std],
    }
    vae.register_to_config(**rounded)


def _untie(config: Path) -> None:
    """Set `tie_word_embeddings` to false, as the released file has it; the class saves true."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values["tie_word_embeddings"] = False
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
