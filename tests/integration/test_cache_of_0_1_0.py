"""A cache that release 0.1.0 wrote is used as it is: nothing in it is encoded again."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.models import temporary_copy
from wanlora.commands import cache_latents, train
from wanlora.config import CacheLatentsConfig, TrainConfig
from wanlora.store.views import read_view

FIXTURE = Path(__file__).parent.parent / "fixtures" / "v0.1.0"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "old"))


@pytest.fixture
def config(old: Path, micro_home: Path) -> CacheLatentsConfig:
    return CacheLatentsConfig(
        manifest=(old / "data",), cache=old / "cache", model="micro", device="cpu"
    )


def test_its_rows_are_recognised_and_new_ones_join_them(config, old):
    before = read_view(config.cache, "default")
    result = cache_latents.run(config)
    assert (result.clips_encoded, result.prompts_encoded, result.clips) == (0, 0, 6)
    after = read_view(config.cache, "default")
    assert after.encodings == before.encodings
    assert after.provenance("latents") == before.provenance("latents")
    path = old / "data" / "train.jsonl"
    path.write_text(path.read_text().replace("a still square number 1", "a new caption"))
    again = cache_latents.run(config)
    assert (again.clips_encoded, again.prompts_encoded) == (0, 1)
    assert read_view(config.cache, "default").fingerprint("text") == before.fingerprint("text")


def test_the_same_encoders_in_other_files_are_recognised_once_the_first_were(
    config,
    tmp_path,
    micro_folder,
):
    other = temporary_copy(micro_folder, tmp_path / "other")
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "saved": "again"})
    elsewhere = config.model_copy(update={"model": str(other), "dry_run": True})
    assert cache_latents.run(elsewhere).clips_encoded == 6  # nothing ties these files to the cache
    cache_latents.run(config)
    result = cache_latents.run(elsewhere)
    assert (result.clips_encoded, result.prompts_encoded) == (0, 0)


def test_training_runs_on_its_view(old):
    config = TrainConfig(
        cache=old / "cache", output_dir=old / "new", max_steps=1, device="cpu", eager="on",
        lora={"rank": 1, "targets": "attention"}, validation={"every": 0}, trackers=(),
    )  # fmt: skip
    assert train.run(config).steps == 1
