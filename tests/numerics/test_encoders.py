"""Stage one's numerics against WanPipeline and against the VAE's own rules."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean  # noqa: TID251  (the oracle)
from safetensors.torch import load_file, save_file

from wanlora.core import prompts
from wanlora.core.fingerprint import fingerprint
from wanlora.errors import MediaError, ModelError
from wanlora.micro import world
from wanlora.wan import encoders
from wanlora.wan.provenance import text_provenance, vae_provenance
from wanlora.wan.variants import VARIANTS

CPU = torch.device("cpu")
PROMPTS = [
    "",
    "a red circle moving left on a black background",
    "  Fünf &amp;amp; zwölf\n\n Boxkämpfer &lt;3 ",
    "schÃ¶n “quoted” ＡＢＣ 跑步",
    "a person walking " * 300,
]


@pytest.fixture(scope="module")
def vae(micro_folder):
    return encoders.load_vae(micro_folder, dtype=torch.float32, device=CPU, tf32=True)


@pytest.fixture(scope="module")
def text_encoder(micro_folder):
    return encoders.load_text_encoder(micro_folder, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def pipeline(micro_folder):
    pipeline = WanPipeline.from_pretrained(micro_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def frames(num_frames: int = 9, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, 3, num_frames, 32, 48), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


# --- latents ---


def test_latents_are_the_normalised_posterior_mean(vae):
    pixels = frames()
    with torch.no_grad():
        raw = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean
    row = VARIANTS["micro"].vae
    expected = np.stack(
        [(raw[0, c].numpy() - np.float32(row.latents_mean[c])) / np.float32(row.latents_std[c])
         for c in range(16)]
    )  # fmt: skip
    assert np.array_equal(encoders.encode_latents(vae, pixels)[0].numpy(), expected)


def test_uint8_and_signed_float_frames_encode_alike(vae):
    pixels = frames()
    signed = pixels.float() / 127.5 - 1
    assert torch.equal(encoders.encode_latents(vae, pixels), encoders.encode_latents(vae, signed))


def test_latents_do_not_depend_on_the_batch(vae):
    pixels = torch.cat([frames(seed=1), frames(seed=2)])
    both = encoders.encode_latents(vae, pixels)
    assert torch.equal(both[1:], encoders.encode_latents(vae, pixels[1:]))


def test_encoding_a_prefix_gives_a_prefix_of_the_latents(vae):
    pixels = frames(num_frames=13)
    whole = encoders.encode_latents(vae, pixels)
    for k in range(4):
        prefix = encoders.encode_latents(vae, pixels[:, :, : 1 + 4 * k])
        assert torch.equal(prefix, whole[:, :, : 1 + k])


def test_latents_of_drawn_clips_have_mean_0_and_spread_1(vae):
    """The micro model's latents_mean/std are measured; here on clips that were not used."""
    clips = [world.draw(concept, 4_000_000).frames for concept in world.KNOWN]
    latents = encoders.encode_latents(vae, torch.from_numpy(np.stack(clips)).movedim(-1, 1))
    assert latents.mean().abs() < 0.2
    assert 0.7 < latents.std() < 1.3
    assert latents.std((0, 2, 3, 4)).min() > 0.3


def test_decoding_equals_the_pipelines_decoding(vae, pipeline):
    latents = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(value).view(1, 16, 1, 1, 1)
        for value in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        videos = [
            pipeline.vae.decode(latents[i : i + 1] / (1.0 / std) + mean).sample for i in range(2)
        ]
    expected = [
        np.stack([np.asarray(image) for image in
                  pipeline.video_processor.postprocess_video(video, output_type="pil")[0]])
        for video in videos
    ]  # fmt: skip
    assert np.array_equal(encoders.decode_latents(vae, latents).numpy(), np.stack(expected))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 9, 3, 32, 32), r"permute\(0, 2, 1, 3, 4\)"),
        ((1, 3, 3, 32, 32), "expected 4k"),  # 3 frames of [B, T, C, H, W] pass for 3 channels
        ((1, 3, 16, 32, 32), "16 frames"),
        ((1, 3, 9, 36, 32), "multiples of 8"),
    ],
)
def test_a_wrong_layout_is_refused(shape, message):
    # Not through encode_latents: in tests its annotation refuses three of these first.
    with pytest.raises(MediaError, match=message):
        encoders._check_frames(torch.zeros(shape))


def test_frames_outside_the_range_are_refused(vae):
    with pytest.raises(MediaError, match=r"range from [0-9]+ to 255.*\[-1, 1\]"):
        encoders.encode_latents(vae, frames(1).float())


def test_a_tiling_vae_is_refused(micro_folder):
    vae = encoders.load_vae(micro_folder, dtype=torch.float32, device=CPU, tf32=True)
    vae.enable_tiling()
    with pytest.raises(ModelError, match="tiles"):
        encoders.encode_latents(vae, frames(1))


# --- prompts ---


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_cleaned_as_diffusers_cleans_them(prompt):
    assert prompts.clean_prompt(prompt) == prompt_clean(prompt)


def test_padded_embeddings_equal_the_pipelines_bit_for_bit(text_encoder, pipeline):
    for prompt, rows in zip(PROMPTS, encoders.encode_prompts(text_encoder, PROMPTS), strict=True):
        with torch.no_grad():
            expected = pipeline.encode_prompt(
                prompt, max_sequence_length=512, do_classifier_free_guidance=False
            )[0][0]
        padded = torch.zeros(512, rows.shape[1])
        padded[: len(rows)] = rows
        assert torch.equal(padded, expected)


def test_the_pipeline_makes_the_same_video_from_rebuilt_embeddings(text_encoder, pipeline):
    prompt = PROMPTS[1]
    rebuilt = []
    for rows in encoders.encode_prompts(text_encoder, [prompt, ""]):
        rebuilt.append(torch.zeros(1, 512, rows.shape[1]))
        rebuilt[-1][0, : len(rows)] = rows

    def video(**inputs):
        return pipeline(
            **inputs, height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        ).frames  # fmt: skip

    assert torch.equal(
        video(prompt=prompt),
        video(prompt_embeds=rebuilt[0], negative_prompt_embeds=rebuilt[1]),
    )


def test_the_empty_prompt_is_one_row_that_is_not_zero(text_encoder):
    [rows] = encoders.encode_prompts(text_encoder, [""])
    assert rows.shape == (1, 64)
    assert rows.abs().max() > 0


def test_a_prompts_key_is_that_of_its_cleaned_text():
    assert prompts.prompt_key(" a  dog &amp; a cat\n") == prompts.prompt_key("a dog & a cat")
    assert prompts.prompt_key("a dog") != prompts.prompt_key("a cat")


def test_tokens_are_counted_past_the_limit(text_encoder):
    assert encoders.num_prompt_tokens(text_encoder.tokenizer, "") == 1
    assert encoders.num_prompt_tokens(text_encoder.tokenizer, "a person walking") == 4
    assert encoders.num_prompt_tokens(text_encoder.tokenizer, PROMPTS[-1]) == 901


def test_embeddings_that_are_not_finite_are_refused(micro_folder):
    encoder = encoders.load_text_encoder(micro_folder, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        encoder.model.encoder.final_layer_norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="'a dog'"):
        encoders.encode_prompts(encoder, ["a dog"])


def test_embeddings_that_are_all_zero_are_refused(micro_folder):
    encoder = encoders.load_text_encoder(micro_folder, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        encoder.model.encoder.final_layer_norm.weight.zero_()
    with pytest.raises(ModelError, match="constant"):
        encoders.encode_prompts(encoder, ["a dog"])


# --- weights ---


def drop_tensor(file, name):
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_vae_with_a_missing_weight_is_refused(micro_folder, tmp_path):
    shutil.copytree(micro_folder / "vae", tmp_path / "vae")
    drop_tensor(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "quant_conv.weight")
    with pytest.raises(ModelError, match=r"1 missing_keys: quant_conv\.weight"):
        encoders.load_vae(tmp_path, dtype=torch.float32, device=CPU, tf32=True)


def test_a_text_encoder_with_a_missing_weight_is_refused(micro_folder, tmp_path):
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(micro_folder / part, tmp_path / part)
    index = tmp_path / "text_encoder" / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    name = "encoder.final_layer_norm.weight"
    drop_tensor(tmp_path / "text_encoder" / shards[name], name)
    with pytest.raises(ModelError, match="final_layer_norm"):
        encoders.load_text_encoder(tmp_path, dtype=torch.float32, device=CPU)


def test_the_provenance_changes_with_everything_that_changes_latents(micro_folder, tmp_path):
    settings = {
        "dtype": torch.float32, "tf32": True, "store_dtype": "float16", "transform_revision": 1,
        "memo": {},
    }  # fmt: skip
    prints = {fingerprint(vae_provenance(micro_folder, **settings))}
    for change in (
        {"dtype": torch.bfloat16}, {"tf32": False}, {"store_dtype": "float32"},
        {"transform_revision": 2},
    ):  # fmt: skip
        prints.add(fingerprint(vae_provenance(micro_folder, **(settings | change))))
    shutil.copytree(micro_folder / "vae", tmp_path / "vae")
    assert fingerprint(vae_provenance(tmp_path, **settings)) in prints
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["quant_conv.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    prints.add(fingerprint(vae_provenance(tmp_path, **settings)))
    assert len(prints) == 6


def test_the_provenance_changes_with_everything_that_changes_embeddings(micro_folder, tmp_path):
    settings = {"dtype": torch.bfloat16, "store_dtype": "float16", "memo": {}}
    prints = {fingerprint(text_provenance(micro_folder, **settings))}
    for change in ({"dtype": torch.float32}, {"store_dtype": "float32"}):
        prints.add(fingerprint(text_provenance(micro_folder, **(settings | change))))
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(micro_folder / part, tmp_path / part)
    assert fingerprint(text_provenance(tmp_path, **settings)) in prints
    tokens = tmp_path / "tokenizer" / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace("walking", "talking"))
    prints.add(fingerprint(text_provenance(tmp_path, **settings)))
    assert len(prints) == 4


def test_loading_an_encoder_turns_reduced_matrix_products_off(micro_folder):
    before = torch.get_float32_matmul_precision()
    load = {
        "vae": lambda: encoders.load_vae(micro_folder, dtype=torch.float32, device=CPU, tf32=True),
        "text": lambda: encoders.load_text_encoder(micro_folder, dtype=torch.float32, device=CPU),
    }
    try:
        for loading in load.values():
            torch.set_float32_matmul_precision("medium")  # as an environment variable may
            loading()
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
