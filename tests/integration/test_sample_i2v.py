"""`wanlora sample` of an image-to-video model: against plain diffusers, and refusals."""

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from tests.support.i2v import i2v_folder
from wanlora.wan import pipeline as wan
from wanlora.wan.offload import part_bytes
from wanlora.wan.variants import variant_of

CPU = torch.device("cpu")
PROMPT = "a red person waving on a white background"
NUM_STEPS = 3
FRAMES, HEIGHT, WIDTH = 5, 32, 48


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Smooth colours that differ everywhere, uint8 `[height, width, 3]`."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def plain(folder, image: np.ndarray, *, seed: int = 0, **guidance: float) -> np.ndarray:
    """Make a video as diffusers' documentation does."""
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        Image.fromarray(image), PROMPT, negative_prompt="blue", num_frames=FRAMES, height=HEIGHT,
        width=WIDTH, num_inference_steps=NUM_STEPS, output_type="pil",
        generator=torch.Generator("cpu").manual_seed(seed), **guidance,
    ).frames[0]  # fmt: skip
    return np.stack([np.asarray(frame) for frame in images])


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "experts"])
def test_a_pipeline_gives_plain_diffusers_video(tmp_path, clip):
    folder = i2v_folder(tmp_path / "model", clip=clip, experts=not clip)
    low = None if clip else 2.0
    settings = wan.VideoSettings(
        num_frames=FRAMES, height=HEIGHT, width=WIDTH, steps=NUM_STEPS, guidance_scale=3.0,
        negative_prompt="blue", guidance_scale_low=low,
    )  # fmt: skip
    pipeline = wan.load_pipeline(folder, dtype=torch.float32, device=CPU)
    image = picture()
    ours = wan.generate(pipeline, PROMPT, settings, seed=4, image=image)
    guidance = {"guidance_scale": 3.0} | ({} if clip else {"guidance_scale_2": 2.0})
    assert np.array_equal(ours, plain(folder, image, seed=4, **guidance))
    other = wan.generate(pipeline, PROMPT, settings, seed=4, image=picture(seed=1))
    assert not np.array_equal(ours, other)
    parts = part_bytes(folder, variant_of(folder), device=CPU, dtype=torch.float32)
    assert ("image_encoder" in parts) == clip
    if clip:
        held = sum(parameter.nbytes for parameter in pipeline.image_encoder.parameters())
        assert parts["image_encoder"] == held
