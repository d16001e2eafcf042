"""`wanlora evaluate` of a model with two transformers, each with an adapter of its own."""

import json
import shutil
import weakref
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from tests.support import cli
from tests.support.browser import CHROMIUM, title_in_a_browser
from tests.support.experts import pair_folder
from tests.support.models import random_tensors
from wanlora.adapters.attach import attach
from wanlora.adapters.file import LoraShape, save_adapter
from wanlora.adapters.lora import add_adapter
from wanlora.commands.evaluate import preflight, transformers, videos
from wanlora.commands.evaluate import run as evaluate
from wanlora.commands.evaluate.setup import open_setup
from wanlora.commands.evaluate.subjects import subjects
from wanlora.commands.evaluate.video_plan import plan
from wanlora.config import EvaluateConfig
from wanlora.core.rng import Stream, normal
from wanlora.store.reader import StoreReader
from wanlora.store.views import read_view
from wanlora.wan.encoders import load_vae
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")
BOUNDARY = 0.875
SHARE = 1 - NormalDist().cdf(float(np.log(0.7 / 0.3)))
"""Probability of sigma >= 0.875 under logit-normal(0, 1) with shift 3, which maps 0.7 to 0.875."""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A pair in `model`, adapters of each expert in `high` and `low`, one of micro in `micro`."""
    folder = tmp_path_factory.mktemp("pair")
    transformer = load_transformer(
        pair_folder(folder / "model"), dtype=torch.float32, device=CPU
    )  # fmt: skip
    shape = LoraShape(rank=2, alpha=2.0)
    parameters = add_adapter(transformer, shape, seed=0)
    for seed, name in enumerate(("high", "low", "micro")):
        provenance = {"variant": "micro"} if name == "micro" else {
            "variant": "micro-a14b", "expert": name, "model": str(folder / "model"),
            "sampler": "logit_normal", "shift": "5.0" if name == "low" else "3.0",
        }  # fmt: skip
        save_adapter(
            folder / name, random_tensors(parameters, seed, scale=0.03), shape,
            provenance=provenance,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def evaluated(project, held_out_cache) -> Path:
    """The folder of an evaluation of both experts, with videos."""
    folder = project / "both"
    cli.run(
        "evaluate", "--cache", held_out_cache, "--model", project / "model",
        "--adapter", project / "low", "--adapter", project / "high", "--output-dir", folder,
        "--set", "num_sigmas=4", "--steps", 3, "--videos-per-activity", 1,
    )  # fmt: skip
    return folder


def config(project, cache, folder, *adapters, **values) -> EvaluateConfig:
    settings = {
        "cache": cache, "model": str(project / "model"), "output_dir": folder, "num_sigmas": 4,
        "steps": 3, "videos_per_activity": 0, "adapter": tuple(str(project / a) for a in adapters),
    }  # fmt: skip
    return EvaluateConfig(**(settings | values))


def read(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def test_each_adapter_is_measured_on_its_own_range_and_both_are_joined_by_the_density(evaluated):
    found = read(evaluated)
    low, high = found["adapters"]
    assert (low["expert"], high["expert"]) == ("low", "high")
    assert [row["sigma"] for row in high["validation"]["per_sigma"]] == pytest.approx(
        found["experts"]["high"]["sigmas"]
    )
    assert all(row["sigma"] >= BOUNDARY for row in high["validation"]["per_sigma"])
    assert all(row["sigma"] < BOUNDARY for row in low["validation"]["per_sigma"])
    shares = {name: expert["share"] for name, expert in found["experts"].items()}
    assert found["density"] == {"sampler": "logit_normal", "shift": "3.0"}
    assert shares == pytest.approx({"high": SHARE, "low": 1 - SHARE})
    for kind in ("base", "adapter", "paired_difference"):
        parts = [high["validation"][kind], low["validation"][kind]]
        assert found["joined"][kind] == pytest.approx(SHARE * parts[0] + (1 - SHARE) * parts[1])
    assert found["joined"]["source_groups"] == 3
    assert found["gains"]["paired_difference"] == pytest.approx(
        high["validation"]["paired_difference"] - low["validation"]["paired_difference"]
    )
    assert "high-noise expert" in found["answer"]
    assert found["best_by_expert"] == {"high": "high", "low": "low"}


def test_each_range_is_measured_with_its_own_transformer(evaluated, project, held_out_cache):
    """The base's loss at the first noise level of each range, by diffusers and a plain loop."""
    found = read(evaluated)
    view = read_view(held_out_cache, "default")
    reader = StoreReader.of_view(held_out_cache, view)
    clips = {clip.clip_id: clip for clip in view.clips}
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        model = WanTransformer3DModel.from_pretrained(project / "model" / part).eval()
        sigma = found["experts"][expert]["sigmas"][0]
        losses = []
        for row, name in enumerate(found["clips"]):
            latents = torch.from_numpy(reader.latents(clips[name].key).astype(np.float32))
            noise = torch.from_numpy(normal(0, Stream.VALIDATION, row, 0, tuple(latents.shape)))
            rows = reader.prompt_embeds(clips[name].prompts[0]).astype(np.float32)
            embeds = torch.zeros(1, 512, rows.shape[1])
            embeds[0, : len(rows)] = torch.from_numpy(rows)
            with torch.no_grad():
                velocity = model(
                    ((1 - sigma) * latents + sigma * noise)[None], torch.tensor([1000 * sigma]),
                    embeds, return_dict=False,
                )[0]  # fmt: skip
            losses.append((velocity[0] - (noise - latents)).square().mean().item())
        (item,) = (item for item in found["adapters"] if item["expert"] == expert)
        assert item["validation"]["per_sigma"][0]["base"] == pytest.approx(
            np.mean(losses), rel=1e-4
        )


def test_losses_need_one_transformer_in_memory_at_a_time(
    project, held_out_cache, tmp_path, monkeypatch
):
    loaded: list[weakref.ref] = []
    alive = []

    def counted(*arguments, **settings):
        alive.append(sum(model() is not None for model in loaded))
        transformer = load_transformer(*arguments, **settings)
        loaded.append(weakref.ref(transformer))
        return transformer

    monkeypatch.setattr(transformers, "load_transformer", counted)
    evaluate(config(project, held_out_cache, tmp_path / "out", "high", "low", num_sigmas=1))
    assert alive == [0, 0]


def test_one_expert_alone_needs_only_its_own_weights_and_the_other_can_be_added(
    project, held_out_cache, tmp_path, caplog
):
    half = tmp_path / "half"
    shutil.copytree(project / "model", half)
    weights = half / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    folder = tmp_path / "out"
    evaluate(config(project, held_out_cache, folder, "low", model=str(half)))
    found = read(folder)
    assert list(found["experts"]) == ["low"]
    assert "shift 5.0" in caplog.text
    assert (found["joined"], found["gains"]) == (None, None)
    assert max(found["sigmas"]) < BOUNDARY
    assert found["answer"].count("-noise expert") == 1
    weights.write_bytes(whole)
    # Both contain the findings about one; another expert alone does not.
    arguments = (
        "evaluate", "--cache", held_out_cache, "--model", half, "--output-dir", folder,
        "--set", "num_sigmas=4", "--steps", 3, "--videos-per-activity", 0, "--adapter",
    )  # fmt: skip
    assert "1 adapters" in cli.refuses(*arguments, project / "high")
    assert read(folder) == found
    evaluate(config(project, held_out_cache, folder, "high", "low", model=str(half)))
    assert "shift 3.0" not in caplog.text
    low = next(item for item in read(folder)["adapters"] if item["expert"] == "low")
    assert low["validation"] == found["validation"]


def test_its_videos_are_those_of_plain_diffusers_with_an_adapter_in_each_expert(
    project, held_out_cache, tmp_path
):
    settings = config(
        project, held_out_cache, tmp_path, "high", "low", videos_per_activity=1, seed=3,
        guidance_scale=3.0, guidance_scale_low=2.0,
    )  # fmt: skip
    setup, experts = open_setup(settings, preflight.check(settings))
    compared = subjects(settings.adapter, experts, checkpoints=False)
    base, adapted = plan(setup, compared, base_dir=tmp_path, output_dir=tmp_path)
    assert (base.name, adapted.name) == ("base", "high and low")
    loaded, in_turn = transformers.Transformers(setup, compared).all()
    assert not in_turn
    for item in adapted.subjects:
        attach(loaded[item.expert], [item.scaled])
    vae = load_vae(setup.folder, dtype=torch.float32, device=CPU, tf32=False)
    video = adapted.videos[0]
    pipeline = WanPipeline.from_pretrained(project / "model")
    pipeline.load_lora_weights(project / "high", adapter_name="x")
    pipeline.load_lora_weights(project / "low", adapter_name="x", load_into_transformer_2=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        video.prompt, generator=torch.Generator("cpu").manual_seed(3), output_type="pil",
        num_frames=5, height=32, width=32, num_inference_steps=3, guidance_scale=3.0,
        guidance_scale_2=2.0,
    ).frames[0]  # fmt: skip
    theirs = np.stack([np.asarray(image) for image in images])
    assert np.array_equal(videos.generate(setup, loaded, vae, video), theirs)


def test_adapters_that_do_not_fit_the_experts_are_refused_by_name(
    project, held_out_cache, tmp_path
):
    flags = (
        "evaluate", "--cache", held_out_cache, "--output-dir", tmp_path / "out",
        "--videos-per-activity", 0,
    )  # fmt: skip
    pair = (*flags, "--model", project / "model")
    high, low, micro = (project / name for name in ("high", "low", "micro"))
    doubled = cli.refuses(*pair, "--adapter", high, "--adapter-high", f"{high}=0.5")
    assert "high-noise" in doubled
    assert str(high) in doubled
    swapped = cli.refuses(*pair, "--adapter-high", low)
    assert str(low) in swapped
    assert "--adapter-low" in swapped
    foreign = cli.refuses(*pair, "--adapter", high, "--adapter", micro)
    assert str(micro) in foreign
    on_one = cli.refuses(*flags, "--model", "micro", "--adapter", high)
    assert str(project / "model") in on_one
    low_scale = ("--guidance-scale-low", 3)
    one = cli.refuses(*flags, "--model", "micro", "--adapter", micro, *low_scale, exit_code=2)
    assert "--guidance-scale-low" in one
    without = cli.refuses(*pair, "--adapter", high, "--guidance-scale", 1, *low_scale, exit_code=2)
    assert "--guidance-scale-low" in without
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_has_a_panel_of_each_expert_and_one_of_both(evaluated, tmp_path):
    text = (evaluated / "report.html").read_text()
    probe = tmp_path / "probe.html"
    script = """<script>addEventListener("load", () => { document.title = JSON.stringify({
        headings: [...document.querySelectorAll("h2")].map(h => h.textContent),
        verdicts: [...document.querySelectorAll(".verdict")].map(p => p.textContent),
        charts: document.querySelectorAll(".chart svg").length,
        players: [...document.querySelectorAll(".player")].map(p => p.querySelectorAll("video").length),
        clipped: [...document.querySelectorAll(".chart svg text")].filter(t => { const b = t.getBoundingClientRect(),
          s = t.closest("svg").getBoundingClientRect(); return b.left < s.left - 1 || b.right > s.right + 1; }).length,
        }); });</script>"""  # noqa: E501
    probe.write_text(text.replace("</body>", f"{script}</body>"))
    found = title_in_a_browser(probe, tmp_path)
    first, second, both, *_ = found["headings"]
    assert "high-noise expert" in first
    assert "low-noise expert" in second
    assert "both" in both.lower()
    assert len(found["verdicts"]) == 4
    assert found["verdicts"][-1] == read(evaluated)["answer"]
    assert (found["charts"], found["clipped"]) == (7, 0)
    assert found["players"] == [3, 3, 3]
