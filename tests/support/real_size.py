"""The real model without its weights: on the meta device, in the types it trains in."""

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

from wanlora.core.flops import TransformerShape
from wanlora.wan.targets import PRESETS
from wanlora.wan.variants import VARIANTS


def shape_of(variant: str, num_layers: int | None = None) -> TransformerShape:
    row = VARIANTS[variant]
    return TransformerShape(
        num_layers=num_layers or row.num_layers, num_attention_heads=row.num_attention_heads,
        attention_head_dim=row.attention_head_dim, ffn_dim=row.ffn_dim, text_dim=row.text_dim,
    )  # fmt: skip


def transformer(
    shape: TransformerShape,
    *,
    targets: str = "attention",
    rank: int = 32,
    device: str = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> WanTransformer3DModel:
    """Build it frozen, with an adapter; fp32 where diffusers keeps fp32 when it loads weights."""
    with torch.device(device):
        model = WanTransformer3DModel(
            num_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads,
            attention_head_dim=shape.attention_head_dim, ffn_dim=shape.ffn_dim,
            text_dim=shape.text_dim, freq_dim=shape.freq_dim, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        ).requires_grad_(False).eval()  # fmt: skip
        pattern = PRESETS.get(targets, targets)
        model.add_adapter(LoraConfig(r=rank, target_modules=pattern, init_lora_weights=False))
    kept = model._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    return model.to(device)


def inputs(
    model: WanTransformer3DModel, num_frames: int, height: int, width: int
) -> dict[str, torch.Tensor]:
    """One clip of a bucket, as the transformer takes it."""
    parameter = model.proj_out.weight
    as_it = {"device": parameter.device, "dtype": parameter.dtype}
    return {
        "hidden_states": torch.ones(
            1, 16, 1 + (num_frames - 1) // 4, height // 8, width // 8, **as_it
        ),
        "timestep": torch.full((1,), 500.0, device=parameter.device),
        "encoder_hidden_states": torch.ones(1, 512, model.config.text_dim, **as_it),
    }


def loss(model: WanTransformer3DModel, values: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**values, return_dict=False)[0].float().square().mean()


def fused_attention(query, key, value, **_settings):
    """On the meta device torch takes the unfused kernel; a GPU runs this one or its like."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[0]
