"""T2V-14B, the second row of the table: its proportions, small, on another variant's cache."""

import json
import shutil
from dataclasses import replace

import av
import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import WanTransformer3DModel

from tests.support import cli
from wanlora.adapters.attach import attach_by_expert, read_scaled
from wanlora.store.views import read_view
from wanlora.wan.pipeline import VideoSettings, generate, load_pipeline, prepare, transformers_of
from wanlora.wan.variants import VARIANTS

NAME = "pytorch_lora_weights.safetensors"
ROW, MICRO = VARIANTS["t2v-14b"], VARIANTS["micro"]
LAYERS = HEADS = 8  # of 40 and 40
HEAD_DIM = 16  # of 128
FFN = round(ROW.shape.ffn_dim / ROW.shape.width * HEADS * HEAD_DIM)
SMALL = ("--max-steps", 2, "--set", "lora.rank=2", "--set", "validation.every=0",
         "--set", "optimizer.warmup_steps=0", "--set", "trackers=[]")  # fmt: skip


@pytest.fixture
def small_14b(tmp_path, monkeypatch, micro_folder):
    """A model folder with micro's encoders and a transformer of the 14B's proportions; its row."""
    assert ROW.shape.num_layers / ROW.shape.num_attention_heads == LAYERS / HEADS
    shape = replace(
        MICRO.shape, num_layers=LAYERS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        ffn_dim=FFN,
    )  # fmt: skip
    row = replace(MICRO, name="small-14b", shape=shape)
    monkeypatch.setitem(VARIANTS, row.name, row)
    folder = tmp_path / "small-14b"
    folder.mkdir()
    for part in ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        (folder / part).symlink_to(micro_folder / part)
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_layers=LAYERS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, ffn_dim=FFN,
        text_dim=row.shape.text_dim, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def cache(cache_fp16, tmp_path):
    """A cache that the other variant's encoders made."""
    return shutil.copytree(cache_fp16, tmp_path / "cache")


def succeeds(*arguments):
    done = cli.invoke(*arguments)
    assert done.exit_code == 0, done.output
    return done.output


def header(run_dir):
    with safetensors.safe_open(run_dir / NAME, "pt") as opened:
        return opened.metadata()


def test_one_cache_trains_both_variants_and_each_adapter_draws_with_its_own(
    small_14b, cache, npz_manifest, tmp_path
):
    run_dir = tmp_path / "run"
    succeeds(
        "train", "--cache", cache, "--model", small_14b, "--device", "cpu", "--output-dir", run_dir,
        *SMALL,
    )  # fmt: skip
    assert header(run_dir)["wanlora.variant"] == "small-14b"
    video = tmp_path / "a.mp4"
    sizes = ("--num-frames", 5, "--height", 32, "--width", 48, "--steps", 1)
    succeeds("sample", "--adapter", run_dir, "--device", "cpu", "--prompt", "x", *sizes,
             "--output", video)  # fmt: skip
    with av.open(str(video)) as opened:
        assert sum(1 for _ in opened.decode(video=0)) == 5
    wrong = ("sample", "--adapter", run_dir, "--model", "micro", "--prompt", "x", *sizes)
    refusal = cli.refuses(*wrong, "--output", tmp_path / "b.mp4")
    assert "small-14b" in refusal
    assert "--model" in refusal

    # The other way round: its encoders find every clip and caption there, and micro trains on them.
    said = succeeds(
        "cache-latents", "--manifest", npz_manifest, "--cache", cache, "--view", "of-14b",
        "--model", small_14b, "--device", "cpu", "--set", "text_dtype=float32",
    )  # fmt: skip
    assert "0 encoded" in said
    assert read_view(cache, "of-14b").model == str(small_14b)
    micro_run = tmp_path / "micro-run"
    succeeds("train", "--cache", cache, "--view", "of-14b", "--model", "micro", "--output-dir",
             micro_run, *SMALL)  # fmt: skip
    assert header(micro_run)["wanlora.variant"] == "micro"


def test_the_14b_model_trains_on_single_frames(small_14b, cache, tmp_path):
    run_dir = tmp_path / "run"
    succeeds(
        "train", "--cache", cache, "--model", small_14b, "--device", "cpu", "--output-dir", run_dir,
        "--set", "train_frames=1", *SMALL,
    )  # fmt: skip
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["bucket"] for row in rows] == ["1x32x48"] * 2


def test_estimate_answers_for_the_14b_model_in_words_and_in_figures():
    arguments = ("estimate", "--variant", "t2v-14b", "--device", "h100")
    found = json.loads(cli.invoke(*arguments, "--json").stdout)
    assert found["variant"] == "t2v-14b"
    assert found["fits"]
    assert found["activations"] == "5 full + 35 selective"
    assert [found["modes"][way]["fits"] for way in ("none", "selective", "full")] == [
        False, False, True,
    ]  # fmt: skip
    assert found["tflop_per_step"] == pytest.approx(4714, abs=1)
    said = cli.invoke(*arguments).stdout
    assert "t2v-14b on H100" in said
    assert "5 full + 35 selective  80.4 GB      yes" in said


def test_the_14b_model_fits_a_card_of_24_gb_with_streamed_blocks_and_inputs_in_host_memory():
    job = ("--variant", "t2v-14b", "--device", "rtx4090", "--json")
    found = json.loads(cli.invoke("estimate", *job).stdout)
    assert found["fits"]
    assert found["num_streamed"] == 40
    assert {name for name, mode in found["modes"].items() if mode["fits"]} == {"offload"}
    assert found["modes"]["offload"]["peak_gb"] == pytest.approx(17.1, abs=0.05)


def test_a_streamed_run_is_the_resident_one_and_resumes_with_another_number(
    small_14b, cache, tmp_path
):
    """Bit for bit with 8-bit weights: losses and adapter, over a resume with another number."""

    def trains(run_dir, *options):
        succeeds(
            "train", "--cache", cache, "--model", small_14b, "--device", "cpu", "--eager", "on",
            "--output-dir", run_dir, *SMALL[2:], "--quantize", "int8", *options,
        )  # fmt: skip

    resident, streamed = tmp_path / "resident", tmp_path / "streamed"
    trains(resident, "--max-steps", 4, "--stream-blocks", 0, "--activations", "none")
    trains(streamed, "--max-steps", 2, "--stream-blocks", LAYERS, "--activations", "full")
    succeeds("train", "--output-dir", streamed, "--resume", "--max-steps", 4, "--stream-blocks", 3,
             "--activations", "selective")  # fmt: skip
    expected, found = (
        safetensors.torch.load_file(run_dir / NAME) for run_dir in (resident, streamed)
    )
    assert any(bool(tensor.any()) for name, tensor in expected.items() if "lora_B" in name)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    metrics = [(run_dir / "metrics.jsonl").read_text() for run_dir in (resident, streamed)]
    losses = [[json.loads(line).get("loss") for line in text.splitlines()] for text in metrics]
    assert losses[0] == losses[1]


@pytest.fixture
def trained(small_14b, cache, tmp_path):
    """A run of the small model."""
    run_dir = tmp_path / "run"
    succeeds(
        "train", "--cache", cache, "--model", small_14b, "--device", "cpu", "--output-dir", run_dir,
        "--lr", "0.1", *SMALL,
    )  # fmt: skip
    return run_dir


def test_videos_and_losses_of_streamed_blocks_are_those_of_resident_ones(
    trained, small_14b, cache, tmp_path
):
    videos, losses = [], []
    for number in (0, 5):
        folder = tmp_path / f"streamed-{number}"
        succeeds(
            "sample", "--adapter", trained, "--device", "cpu", "--prompt", "x", "--num-frames", 5,
            "--height", 32, "--width", 48, "--steps", 2, "--set", "format=frames",
            "--output-dir", folder, "--stream-blocks", number,
        )  # fmt: skip
        videos.append([file.read_bytes() for file in sorted(folder.rglob("*.png"))])
        succeeds(
            "evaluate", "--adapter", trained, "--cache", cache, "--model", small_14b, "--set",
            "split=train", "--device", "cpu", "--videos-per-activity", 0, "--num-clips", 1,
            "--set", "num_sigmas=2", "--output-dir", folder / "evaluation",
            "--stream-blocks", number,
        )  # fmt: skip
        losses.append(json.loads((folder / "evaluation" / "evaluation.json").read_text()))
    assert len(videos[0]) == 5
    assert videos[0] == videos[1]
    text = [json.dumps(found).replace("streamed-5", "streamed-0") for found in losses]
    assert text[0] == text[1]


def test_encoders_take_turns_beside_streamed_transformers(trained, small_14b):
    """They wait in main memory while the transformer runs; the video is the same."""
    frames = []
    cpu = torch.device("cpu")
    settings = VideoSettings(5, 32, 48, steps=1, guidance_scale=5.0, negative_prompt="")
    for num_streamed, offload in ((0, "none"), (LAYERS, "model")):
        pipeline = load_pipeline(
            small_14b, dtype=torch.float32, device=cpu, offload=offload, num_streamed=num_streamed
        )
        attach_by_expert(transformers_of(pipeline), [read_scaled(str(trained))])
        prepare(pipeline, device=cpu, shift=3.0, offload=offload, vae_tiling=False)
        frames.append(generate(pipeline, "x", settings, seed=0))
    assert hasattr(pipeline.vae, "_hf_hook")
    assert not hasattr(pipeline.transformer, "_hf_hook")
    assert (frames[0] == frames[1]).all()


def test_more_streamed_blocks_than_the_model_has_are_refused_with_the_number(
    small_14b, cache, tmp_path
):
    done = cli.invoke(
        "train", "--cache", cache, "--model", small_14b, "--device", "cpu",
        "--output-dir", tmp_path / "run", "--stream-blocks", LAYERS + 1, *SMALL,
    )  # fmt: skip
    assert done.exit_code == 2
    assert f"--stream-blocks {LAYERS} " in done.output
