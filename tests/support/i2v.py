"""Image-to-video models of micro's size, as folders in diffusers' layout.

Owns: the folders. Encoders, scheduler and most weights of the transformer are those of the embedded
micro model; what an image-to-video model has besides is random. Rows: micro-i2v, micro-i2v-clip and
micro-i2v-a14b of the table of variants.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors.numpy import load_file, save_file

from tests.support.experts import WEIGHTS_NAME, perturb
from wanlora.core.rng import Stream, generator
from wanlora.wan import model_folder
from wanlora.wan.variants import VARIANTS

NUM_IMAGE_TOKENS = 257
"""Tokens of the image encoder: 16 x 16 patches and the class."""


def i2v_folder(path: Path, *, clip: bool, experts: bool = False) -> Path:
    """Write a diffusers folder of an image-to-video model, and return it; about 6 MB.

    Args:
        path: Folder that does not exist yet.
        clip: True for an image encoder, as Wan2.1 has: variant micro-i2v-clip.
        experts: True for two transformers, as Wan2.2 has: variant micro-i2v-a14b.
    """
    assert not (clip and experts), "no Wan model has both CLIP and two experts"
    micro = model_folder.resolve(model_folder.MICRO, model_folder.PIPELINE)
    shutil.copytree(micro, path, ignore=shutil.ignore_patterns("README.md"))
    row = VARIANTS["micro-i2v-clip" if clip else "micro-i2v-a14b" if experts else "micro-i2v"]
    _widen(path / "transformer", row.shape.image_dim)
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    nothing = [None, None]
    index |= {
        "_class_name": "WanImageToVideoPipeline", "boundary_ratio": row.boundary,
        "transformer_2": index["transformer"] if experts else nothing,
        "image_encoder": ["transformers", "CLIPVisionModel"] if clip else nothing,
        "image_processor": ["transformers", "CLIPImageProcessor"] if clip else nothing,
    }  # fmt: skip
    _write_json(path / "model_index.json", index)
    if experts:
        shutil.copytree(path / "transformer", path / "transformer_2")
        for seed, name in enumerate(("transformer", "transformer_2"), start=1):
            perturb(path / name / WEIGHTS_NAME, seed)
    if row.shape.image_dim:
        _write_image_encoder(path, row.shape.image_dim)
    return path


def _widen(folder: Path, image_dim: int | None) -> None:
    """Add the weights that an image-to-video transformer has besides those of text to video."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    config |= {"in_channels": 36, "image_dim": image_dim}
    config |= {"added_kv_proj_dim": width if image_dim else None}
    _write_json(folder / "config.json", config)
    with torch.device("meta"):
        shapes = {
            name: tuple(parameter.shape)
            for name, parameter in WanTransformer3DModel.from_config(config).named_parameters()
        }
    tensors = load_file(folder / WEIGHTS_NAME)
    dtype = tensors["patch_embedding.weight"].dtype
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        draws = generator(1, Stream.INIT, number).standard_normal(shape, dtype=np.float32)
        if name == "patch_embedding.weight":
            own = tensors[name]
            added = (0.05 * draws[:, own.shape[1] :]).astype(dtype)
            tensors[name] = np.concatenate([own, added], axis=1)
        elif name not in tensors:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensors[name] = (centre + 0.1 * draws).astype(dtype)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def _write_image_encoder(path: Path, image_dim: int) -> None:
    """Write a random image encoder with the number of tokens of the released one."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=image_dim, intermediate_size=2 * image_dim, num_hidden_layers=3,
        num_attention_heads=2, image_size=32, patch_size=2, hidden_act="gelu", projection_dim=16,
        initializer_factor=2.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPVisionModel(config).save_pretrained(path / "image_encoder")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**sizes).save_pretrained(path / "image_processor")


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
