"""Wan's parts at their real size, or tiny, with random weights: nothing is downloaded."""

from dataclasses import replace

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from peft import LoraConfig
from transformers import UMT5Config, UMT5EncoderModel

from wanlora.adapters.targets import IMAGE_PRESETS, PRESETS
from wanlora.cost.flops import TransformerShape
from wanlora.cost.memory import Quantize
from wanlora.wan.quantize import quantize_blocks
from wanlora.wan.variants import VARIANTS

TINY = TransformerShape(
    num_layers=3, num_attention_heads=2, attention_head_dim=32, ffn_dim=128, text_dim=32
)


def shape_of(variant: str, num_layers: int | None = None) -> TransformerShape:
    """The transformer of a variant, or some of its blocks."""
    shape = VARIANTS[variant].shape
    return replace(shape, num_layers=num_layers or shape.num_layers)


def transformer(
    shape: TransformerShape,
    *,
    targets: str = "attention",
    rank: int = 32,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    quantize: Quantize = "none",
) -> WanTransformer3DModel:
    """Build it frozen, with an adapter whose B is not zero.

    fp32 where diffusers keeps fp32 when it loads weights; the adapter has the type of its layer.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads,
            attention_head_dim=shape.attention_head_dim, ffn_dim=shape.ffn_dim,
            text_dim=shape.text_dim, freq_dim=shape.freq_dim, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", in_channels=shape.in_channels,
            out_channels=shape.out_channels, image_dim=shape.image_dim,
            added_kv_proj_dim=shape.width if shape.image_dim else None,
        ).requires_grad_(False).eval()  # fmt: skip
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    quantize_blocks(model, quantize)
    pattern = (IMAGE_PRESETS if shape.image_dim else PRESETS).get(targets, targets)
    with torch.device(device):
        model.add_adapter(LoraConfig(r=rank, target_modules=pattern, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model.to(device)


def vae(device: torch.device, *, tiny: bool) -> AutoencoderKLWan:
    """The VAE in fp32, as everybody runs it."""
    sizes = {"base_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1} if tiny else {}
    with device:
        return AutoencoderKLWan(**sizes).requires_grad_(False).eval()


def text_encoder(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> UMT5EncoderModel:
    """UMT5-XXL's encoder, or one of two layers."""
    real = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    small = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = UMT5Config(
        vocab_size=400 if tiny else 256384, feed_forward_proj="gated-gelu",
        **(small if tiny else real),
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 11.4 GB in bf16; twice that on the way from fp32
    try:
        with device:
            return UMT5EncoderModel(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
