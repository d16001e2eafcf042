"""Build the embedded micro model: a whole WanPipeline folder of the real classes.

Owns: the micro model's sizes, vocabulary and weights. The weights are random, but drawn so that the
model behaves: normalised latents of ordinary frames have mean 0 and spread 1 per channel, and the
transformer's output depends on latents, timestep and text. Saved as the released model is: fp32,
the text encoder in shards with only `shared.weight`, `tie_word_embeddings` false.

Every tensor is a function of its name (Philox), so the folder is the same on every machine and no
global random state is touched. Run as `python -m wanlora.wan.micro FOLDER`.
"""

import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wanlora.wan.variants import MICRO, VARIANTS

ROW = VARIANTS[MICRO]
VOCAB_SIZE = 400
TEXT_SHARD_SIZE = "150KB"
"""Small, so that the text encoder is saved in several shards as the released one is."""

_WORDS = """
a an the is on in of and with to from at by one two person people man woman child dog cat ball car
red green blue yellow white black purple orange gray pink brown circle square triangle striped star
stick figure moving left right up down walking waving jumping sitting clapping running dancing
standing background video slowly quickly fast slow large small
"""
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-"


def build(folder: Path) -> None:
    """Write the model's folder, whole or not at all; a folder that exists is left as it is.

    Two processes may build at once: each writes a folder of its own and the first rename wins.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):  # the classes draw weights that are not kept
            _write(work)
        work.chmod(0o755)  # mkdtemp makes it private
        work.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(folder: Path) -> None:
    make_vae().save_pretrained(folder / "vae")
    make_text_encoder().save_pretrained(folder / "text_encoder", max_shard_size=TEXT_SHARD_SIZE)
    _untie(folder / "text_encoder" / "config.json")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    make_transformer().save_pretrained(folder / "transformer")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=ROW.shift
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


def make_vae() -> AutoencoderKLWan:
    """Build the VAE: x4 in time and x8 in space like the real one, a hundredth of its size."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=ROW.z_dim,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=list(ROW.latents_mean),
        latents_std=list(ROW.latents_std),
    )
    _fill(vae, "vae", {"encoder.conv_in.bias": 0.3})
    return vae


def make_text_encoder() -> UMT5EncoderModel:
    """Build the text encoder, with the initial spreads that UMT5 gives its weights."""
    config = UMT5Config(
        vocab_size=VOCAB_SIZE,
        d_model=ROW.text_dim,
        d_kv=16,
        d_ff=2 * ROW.text_dim,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    encoder = UMT5EncoderModel(config)
    # T5's attention has no 1/sqrt(d_kv): it is in the spread of q.
    _fill(encoder, "text_encoder", {"shared.weight": 1.0, ".q.weight": 1 / math.sqrt(64 * 16)})
    return encoder


def make_transformer() -> WanTransformer3DModel:
    """Build the DiT.

    `proj_out` is a multiple of the transposed patch embedding: the prediction starts as a part of
    the noisy latents, which at high sigma is a part of the velocity, so training has a footing.
    """
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=ROW.num_attention_heads,
        attention_head_dim=ROW.attention_head_dim,
        in_channels=ROW.z_dim,
        out_channels=ROW.z_dim,
        text_dim=ROW.text_dim,
        freq_dim=256,
        ffn_dim=ROW.ffn_dim,
        num_layers=ROW.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    width = ROW.num_attention_heads * ROW.attention_head_dim
    _fill(transformer, "transformer", {"scale_shift_table": 1 / math.sqrt(width)})
    for block in transformer.blocks:
        # Sharper than drawn: of 512 rows some 500 are zeros, and must not drown the text.
        block.attn2.norm_k.weight.data.fill_(4.0)
    patch = transformer.patch_embedding.weight.data  # d c 1 2 2
    transformer.proj_out.weight.data = 0.2 * patch.permute(2, 3, 4, 1, 0).flatten(0, 3).contiguous()
    return transformer


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
        model_max_length=ROW.max_sequence_length,
    )


def _fill(model: torch.nn.Module, part: str, special: Mapping[str, float]) -> None:
    """Draw every parameter: matrices N(0, 1/fan-in), norm gains 1, biases 0.

    `special` maps the end of a name to another spread.
    """
    for name, parameter in model.named_parameters():
        spread = next((value for end, value in special.items() if name.endswith(end)), None)
        if spread is None and ("norm" in name or name.endswith("bias")):
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if spread is None:
            spread = 1 / math.sqrt(math.prod(parameter.shape[1:]))
        key = int.from_bytes(hashlib.sha256(f"{part}.{name}".encode()).digest()[:8], "little")
        draw = np.random.Generator(np.random.Philox(key=key))
        values = draw.standard_normal(tuple(parameter.shape), dtype=np.float32)
        parameter.data.copy_(torch.from_numpy(values * np.float32(spread)))


def _untie(config: Path) -> None:
    """Set `tie_word_embeddings` to false, as the released file has it; the class saves true."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values["tie_word_embeddings"] = False
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
