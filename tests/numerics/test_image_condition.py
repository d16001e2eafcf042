"""Denoising from an image, against diffusers' WanImageToVideoPipeline on tiny random models.

The pipeline encodes the image with its own code; `denoise` gets the condition and the embeddings
that the pipeline computed, and must do the rest.
"""

import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from wanlora.errors import ModelError
from wanlora.wan.denoise import LowNoiseExpert, denoise
from wanlora.wan.encoders import encode_latents
from wanlora.wan.image_condition import model_input
from wanlora.wan.image_encoders import encode_condition, encode_image, load_image_encoder

CPU = torch.device("cpu")
SIZE = {"num_frames": 9, "height": 32, "width": 48}
TEXT_DIM, IMAGE_DIM, CHANNELS = 24, 20, 4
BOUNDARY = 0.9
STEPS = 4  # with a shift of 5 the sigmas are 1, 0.94, 0.83 and 0.63: two steps for each expert


def transformer(seed: int, *, clip: bool) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=32, freq_dim=16,
        text_dim=TEXT_DIM, in_channels=2 * CHANNELS + 4, out_channels=CHANNELS,
        image_dim=IMAGE_DIM if clip else None, added_kv_proj_dim=24 if clip else None,
    )  # fmt: skip
    return model.eval().requires_grad_(requires_grad=False)


def pipeline(*, clip: bool, experts: bool) -> WanImageToVideoPipeline:
    first = transformer(1, clip=clip)
    second = transformer(2, clip=clip) if experts else None
    torch.manual_seed(3)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, -0.4], latents_std=[0.5, 0.6, 0.7, 0.8],
    ).eval()  # fmt: skip
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    side = {"height": 16, "width": 16}
    made = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=first, transformer_2=second,
        image_encoder=CLIPVisionModel(config).eval() if clip else None,
        image_processor=CLIPImageProcessor(size=side, crop_size=side) if clip else None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        boundary_ratio=BOUNDARY if experts else None,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8))


def given(pipe: WanImageToVideoPipeline) -> torch.Tensor:
    """Mask and condition as the pipeline makes them, `[1, 4 + c, f, h, w]`."""
    image = pipe.video_processor.preprocess(picture(), height=32, width=48)
    with torch.no_grad():
        return pipe.prepare_latents(
            image, 1, CHANNELS, **SIZE, dtype=torch.float32, device=CPU, generator=None
        )[1]


@pytest.mark.parametrize(
    ("clip", "experts", "guided", "dtype"),
    [
        (True, False, True, torch.float32),
        (False, False, False, torch.float32),
        (False, True, True, torch.float32),
        (True, True, True, torch.bfloat16),
    ],
)
def test_denoising_from_an_image_gives_diffusers_latents(clip, experts, guided, dtype):
    pipe = pipeline(clip=clip, experts=experts)
    for model in filter(None, (pipe.transformer, pipe.transformer_2)):
        model.to(dtype)
    embeds = torch.randn(2, 512, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    scale = 3.0 if guided else 1.0
    theirs = pipe(
        image=picture(), prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], **SIZE,
        num_inference_steps=STEPS, guidance_scale=scale, guidance_scale_2=2.0 if experts else None,
        generator=torch.Generator("cpu").manual_seed(7), output_type="latent",
    ).frames[0]  # fmt: skip
    low = LowNoiseExpert(pipe.transformer_2, 2.0, boundary=BOUNDARY) if experts else None
    with torch.no_grad():
        image_embeds = pipe.encode_image(picture(), CPU)[0] if clip else None
    condition = given(pipe)[0, 4:]

    def ours(condition, image_embeds):
        return denoise(
            pipe.transformer, prompt_embeds=embeds[0], negative_embeds=embeds[1],
            shape=tuple(theirs.shape), steps=STEPS, guidance_scale=scale, shift=5.0, seed=7,
            device=CPU, dtype=dtype, low=low, condition=condition, image_embeds=image_embeds,
        )  # fmt: skip

    assert torch.equal(ours(condition, image_embeds), theirs)
    assert not torch.equal(ours(condition.flip(-1), image_embeds), theirs)
    if image_embeds is not None:
        assert not torch.equal(ours(condition, image_embeds.flip(0)), theirs)


def test_the_input_is_the_pipelines_and_a_dropped_condition_is_zero():
    pipe = pipeline(clip=False, experts=False)
    theirs = given(pipe)
    condition = theirs[:, 4:]
    noisy = torch.randn(2, *condition.shape[1:])
    both = condition.expand(2, -1, -1, -1, -1)
    inputs = model_input(noisy, both)
    assert torch.equal(inputs, torch.cat([noisy, theirs.expand(2, -1, -1, -1, -1)], dim=1))
    for dropped in itertools.product((False, True), repeat=2):
        found = model_input(noisy, both, dropped=torch.tensor(dropped))
        for index, gone in enumerate(dropped):
            assert torch.equal(found[index, CHANNELS:], theirs[0] * (0 if gone else 1))
            assert torch.equal(found[index, :CHANNELS], noisy[index])


def save_encoder(folder, model) -> None:
    model.save_pretrained(folder / "image_encoder")
    pipeline(clip=True, experts=False).image_processor.save_pretrained(folder / "image_processor")


def test_an_image_encoder_gives_the_pipelines_embeddings(tmp_path):
    pipe = pipeline(clip=True, experts=False)
    save_encoder(tmp_path, pipe.image_encoder)
    encoder = load_image_encoder(tmp_path, dtype=torch.float32, device=CPU)
    first_frame = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    with torch.no_grad():
        theirs = pipe.encode_image(picture(), CPU)
    assert torch.equal(encode_image(encoder, first_frame), theirs[0])


def test_a_projection_is_left_out_and_other_weights_are_refused(tmp_path):
    config = pipeline(clip=True, experts=False).image_encoder.config
    projected = CLIPVisionModelWithProjection(config)
    save_encoder(tmp_path, projected)
    loaded = load_image_encoder(tmp_path, dtype=torch.float32, device=CPU).model
    own = dict(projected.vision_model.named_parameters())
    assert all(
        torch.equal(own[name.removeprefix("vision_model.")], value)  # as transformers 5.3 has it
        for name, value in loaded.named_parameters()
    )
    config.num_hidden_layers += 1
    config.save_pretrained(tmp_path / "image_encoder")
    with pytest.raises(ModelError, match=r"missing_keys.*layers\.3\."):
        load_image_encoder(tmp_path, dtype=torch.float32, device=CPU)


def test_a_condition_is_the_pipelines_and_starts_as_the_clips_latents_do():
    pipe = pipeline(clip=False, experts=False)
    first_frame = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    found = encode_condition(pipe.vae, first_frame, num_frames=SIZE["num_frames"])
    assert torch.equal(found, given(pipe)[0, 4:])
    rest = torch.randint(0, 256, (3, SIZE["num_frames"] - 1, 32, 48), dtype=torch.uint8)
    clip = encode_latents(pipe.vae, torch.cat([first_frame[:, None], rest], dim=1)[None])[0]
    torch.testing.assert_close(found[:, 0], clip[:, 0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found[:, 1], clip[:, 1], rtol=1e-6, atol=1e-6)
