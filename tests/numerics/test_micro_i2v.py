"""Conversion of the micro model to an image-to-video model."""

import numpy as np
import torch

from tools.micro import condition, dit, drawn_images, models
from wanlora.micro import world
from wanlora.wan.encoders import encode_latents, load_vae

CPU = torch.device("cpu")


@torch.no_grad()
def test_training_starts_from_the_text_to_video_model():
    """New channels have zeros: any condition gives the output of the narrow transformer."""
    torch.manual_seed(0)
    narrow = models.make_transformer().eval()
    wide = condition.widen(narrow).eval()
    latents, noise, image = torch.randn(3, 2, models.ROW.vae.z_dim, 2, 4, 4)
    embeds = torch.randn(2, 512, models.ROW.shape.text_dim)
    sigmas = torch.tensor([0.3, 0.8])
    expected = dit.loss_at(narrow, latents, embeds, noise, sigmas)
    found = dit.loss_at(wide, latents, embeds, noise, sigmas, image)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_conditions_are_those_of_stage_one(micro_folder):
    vae = load_vae(micro_folder, dtype=torch.float32, device=CPU, tf32=True)
    one = drawn_images.example("waving", 3)
    latents, image = condition.encoded(vae, [one])
    frames = torch.from_numpy(one.frames).permute(3, 0, 1, 2)
    torch.testing.assert_close(latents, encode_latents(vae, frames[None]), atol=1e-4, rtol=1e-4)
    grey = torch.zeros(1, *frames.shape)
    grey[:, :, 0] = frames[:, 0] / 127.5 - 1
    torch.testing.assert_close(image, encode_latents(vae, grey), atol=1e-4, rtol=1e-4)


def test_a_shape_may_start_in_the_middle_and_goes_where_it_went():
    scene = world.scene("circle", 1)
    cover = world.cover("circle", 1)
    moved = drawn_images.nearer(cover, scene.direction, 1.0)
    step = np.array(world.DIRECTIONS[scene.direction])
    rows, columns = np.mgrid[:64, :64] - 31.5

    def middle(frame):
        return np.array([(columns * frame).sum(), (rows * frame).sum()]) / frame.sum()

    assert abs(middle(moved[0]) @ step) < 3 < abs(middle(cover[0]) @ step)
    assert (middle(moved[8]) - middle(moved[0])) @ step > 6
    assert drawn_images.nearer(cover, None, 1.0) is cover


def test_prompts_name_colours_or_leave_them_to_the_image():
    prompts = {drawn_images.example("walking", seed).prompt for seed in range(16)}
    assert "a person walking" in prompts
    assert any("background" in prompt for prompt in prompts)
