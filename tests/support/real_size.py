"""The real model without its weights, from the benchmarks' builders, and clips for it."""

import torch
from diffusers import WanTransformer3DModel

from bench.models import shape_of, transformer

__all__ = ["fused_attention", "inputs", "loss", "shape_of", "transformer"]


def inputs(
    model: WanTransformer3DModel, num_frames: int, height: int, width: int
) -> dict[str, torch.Tensor]:
    """One clip of a bucket, as the transformer takes it."""
    parameter = model.proj_out.weight
    as_it = {"device": parameter.device, "dtype": parameter.dtype}
    config = model.config
    values = {
        "hidden_states": torch.ones(
            1, config.in_channels, 1 + (num_frames - 1) // 4, height // 8, width // 8, **as_it
        ),
        "timestep": torch.full((1,), 500.0, device=parameter.device),
        "encoder_hidden_states": torch.ones(1, 512, config.text_dim, **as_it),
    }
    if config.image_dim:
        values["encoder_hidden_states_image"] = torch.ones(1, 257, config.image_dim, **as_it)
    return values


def loss(model: WanTransformer3DModel, values: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**values, return_dict=False)[0].float().square().mean()


def fused_attention(query, key, value, **_settings):
    """On the meta device torch takes the unfused kernel; a GPU runs this one or its like."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[0]
