"""Commands on a GPU with the micro model: the same latents as a CPU, the same bits after a stop."""

import json

import pytest
import torch

from tests.support.caches import write_npz_clips
from wanlora.wan.encoders import encode_latents, load_vae

ADAPTER = "pytorch_lora_weights.safetensors"
TRAIN = (
    "--save-steps", 2, "--seed", 3, "--learning-rate", 1e-3, "--deterministic", "--eager",
    "--set", "lora.rank=4", "--set", "trackers=[]", "--set", "validation.every=0",
    "--set", "optimizer.warmup_steps=1", "--set", "optimizer.schedule=constant",
)  # fmt: skip


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]


@pytest.mark.slow_on_cpu  # test_resume.py kills and resumes a run on a CPU
def test_a_stopped_run_ends_with_the_same_bits(device, command, tmp_path):
    """Videos to adapter by the commands, without PyAV: the clips are .npz files."""
    manifest = write_npz_clips(tmp_path / "clips", num_clips=3, size=(5, 32, 32))
    cache, whole, stopped = (tmp_path / name for name in ("cache", "whole", "stopped"))
    on = ("--device", device.type)
    command("cache-latents", "--manifest", manifest, "--cache", cache, "--model", "micro", *on)
    train = ("train", "--cache", cache, *TRAIN, *on)
    command(*train, "--output-dir", whole, "--max-steps", 4)
    command(*train, "--output-dir", stopped, "--max-steps", 2)
    command(*train, "--output-dir", stopped, "--max-steps", 4, "--resume")
    assert len(losses(whole)) == 4
    assert losses(stopped) == losses(whole)
    assert (stopped / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def test_latents_are_those_of_float64_on_a_cpu(device, micro_folder):
    coarse = torch.rand(1, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    frames = torch.nn.functional.interpolate(coarse, size=(5, 32, 32), mode="trilinear")
    frames = (255 * frames).to(torch.uint8)

    @torch.no_grad()
    def latents(where, dtype, *, tf32=False):
        vae = load_vae(micro_folder, dtype=dtype, device=where, tf32=tf32)
        found = encode_latents(vae, frames)
        assert found.device.type == where.type
        return found.cpu()

    expected = latents(torch.device("cpu"), torch.float64)

    def error(dtype, **options):
        return (latents(device, dtype, **options) - expected).norm() / expected.norm()

    assert error(torch.float32) < 1e-4
    assert error(torch.bfloat16) < 5e-2
    if device.type == "cuda":
        assert error(torch.float32, tf32=True) < 1e-2
