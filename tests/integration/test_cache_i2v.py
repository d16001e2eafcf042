"""Stage one for image-to-video models: a cache gains the rows of first frames, and nothing else."""

import json
import logging
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.test_downloads import first_run
from tests.support import cli
from tests.support.caches import CAPTIONS, write_npz_clips
from tests.support.hooks import num_committed, record_encodings
from tests.support.hub import serving
from tests.support.i2v import i2v_folder
from wanlora.commands import cache_latents
from wanlora.commands.cache_latents import clip_kinds, encode_settings, worker
from wanlora.commands.cache_latents import plan as planning
from wanlora.commands.cache_latents.find_encoders import find_encoders
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.commands.inspect import run as inspect
from wanlora.config import CacheLatentsConfig, InspectConfig
from wanlora.core.fingerprint import fingerprint
from wanlora.data import clip_frames, manifest
from wanlora.errors import MissingRowsError, ModelError
from wanlora.processes.ranks import Rank
from wanlora.store.reader import StoreReader
from wanlora.store.views import read_view
from wanlora.wan import encoders, image_encoders, provenance

CPU = torch.device("cpu")
CLIPS, PROMPTS = len(CAPTIONS), len(set(CAPTIONS)) + 1
"""Six clips; four different captions of five, and the empty prompt."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return i2v_folder(tmp_path_factory.mktemp("model") / "clip", clip=True)


@pytest.fixture(scope="module")
def model_without_clip(tmp_path_factory) -> Path:
    return i2v_folder(tmp_path_factory.mktemp("model") / "plain", clip=False)


@pytest.fixture
def cache(cache_fp16, tmp_path) -> Path:
    """A cache of a text-to-video model, which is extended."""
    return shutil.copytree(cache_fp16, tmp_path / "cache")


def config(cache: Path, npz_manifest: Path, model: Path | str, **changes) -> CacheLatentsConfig:
    return CacheLatentsConfig(
        manifest=(npz_manifest,), cache=cache, model=str(model), device="cpu",
        text_dtype="float32", **changes,
    )  # fmt: skip


def contents(cache: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file of the store."""
    return {
        str(path.relative_to(cache)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in (cache / "store.zarr").rglob("*")
        if path.is_file()
    }


def counts(result) -> dict[str, tuple[int, int]]:
    return {kind: (rows["encoded"], rows["cached"]) for kind, rows in result.rows.items()}


def test_a_t2v_cache_gains_only_the_rows_of_first_frames(cache, npz_manifest, model, micro_home):
    before, t2v = contents(cache), read_view(cache, "default")
    there = {"text": (0, PROMPTS), "latents": (0, CLIPS)}
    dry = cache_latents.run(config(cache, npz_manifest, model, view="i2v", dry_run=True))
    new = {"cond_latents": (CLIPS, 0), "clip_vision": (CLIPS, 0)}
    assert counts(dry) == there | new
    assert dry.rows["clip_vision"]["bytes"] == CLIPS * 257 * 32 * 2
    assert contents(cache) == before
    result = cache_latents.run(config(cache, npz_manifest, model, view="i2v"))
    assert counts(result) == there | new
    after = contents(cache)
    assert {name: after.get(name) for name in before} == before
    added = {name.split("/")[1] for name in after.keys() - before.keys()}
    assert added == {"cond_latents", "clip_vision"}
    assert read_view(cache, "default") == t2v  # and its rows are there
    StoreReader.of_view(cache, t2v)

    view = read_view(cache, "i2v")
    assert view.kinds == ("latents", "text", "cond_latents", "clip_vision")
    reader = StoreReader.of_view(cache, view)
    vae = encoders.load_vae(model, dtype=torch.float32, device=CPU, tf32=False)
    clip_vision = image_encoders.load_image_encoder(model, dtype=torch.float32, device=CPU)
    keys = {clip.clip_id: clip.key for clip in view.clips}
    for clip in manifest.read_all([npz_manifest])[:2]:
        key, frame = keys[clip.clip_id], clip_frames.load_clip(clip)[0]
        wanted = image_encoders.encode_condition(vae, frame, num_frames=clip.num_frames)
        assert np.array_equal(reader.cond_latents(key), wanted.numpy().astype(np.float16))
        embeds = image_encoders.encode_image(clip_vision, frame)
        assert np.array_equal(reader.clip_vision(key), embeds.numpy().astype(np.float16))
    assert inspect(InspectConfig(path=cache, verify="full")).exit_code == 0
    again = cache_latents.run(config(cache, npz_manifest, model, view="i2v"))
    assert {encoded for encoded, _ in counts(again).values()} == {0}
    assert (again.view_sha256, contents(cache)) == (result.view_sha256, after)


def test_a_view_of_another_model_is_replaced_with_a_warning_that_names_a_free_view(
    cache, npz_manifest, model_without_clip, micro_home, caplog
):
    def warnings(model: Path | str, **changes) -> list[str]:
        caplog.clear()
        cache_latents.run(config(cache, npz_manifest, model, **changes))
        return [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]

    t2v = read_view(cache, "default")
    assert warnings("micro") == []
    for dry_run in (True, False):
        (warning,) = warnings(model_without_clip, dry_run=dry_run)
        assert all(
            part in warning
            for part in ("'default'", "micro (latents, text)", str(model_without_clip),
                         "cond_latents", "--view i2v")
        )  # fmt: skip
        assert (read_view(cache, "default") == t2v) == dry_run
    assert warnings(model_without_clip) == []
    assert warnings("micro", view="t2v") == []
    assert read_view(cache, "t2v").sha256 == t2v.sha256
    (warning,) = warnings("micro")
    assert "--view micro" in warning  # t2v exists


def test_without_clip_only_conditions_are_added_and_only_first_frames_decoded(
    cache, npz_manifest, model_without_clip, monkeypatch
):
    sizes = []
    original = clip_kinds._Condition.__call__

    def counting(self, clip, key, frames):
        sizes.append(len(frames))
        return original(self, clip, key, frames)

    monkeypatch.setattr(clip_kinds._Condition, "__call__", counting)
    result = cache_latents.run(config(cache, npz_manifest, model_without_clip))
    assert counts(result)["cond_latents"] == (CLIPS, 0)
    assert sizes == [1] * CLIPS
    assert not (cache / "store.zarr" / "clip_vision").exists()
    view = read_view(cache, "default")
    assert view.kinds == ("latents", "text", "cond_latents")
    vae, condition = view.provenance("latents"), view.provenance("cond_latents")
    assert condition == {**vae, "kind": "cond_latents", "condition_revision": 1}


def test_a_condition_that_does_not_start_as_the_latents_is_refused_before_it_is_written(
    cache, npz_manifest, model_without_clip, monkeypatch
):
    original = image_encoders.encode_condition

    def of_another_frame(vae, first_frame, *, num_frames):
        return original(vae, first_frame.flip(-1), num_frames=num_frames)

    monkeypatch.setattr(image_encoders, "encode_condition", of_another_frame)
    with pytest.raises(ModelError, match=r"clip-000.* frame 0 .*%"):
        cache_latents.run(config(cache, npz_manifest, model_without_clip, view="i2v"))
    assert not list(cache.glob("store.zarr/cond_latents/*/*/*/zarr.json"))
    assert not (cache / "views" / "i2v.jsonl").exists()
    unchecked = config(cache, npz_manifest, model_without_clip, decode_check=False)
    assert counts(cache_latents.run(unchecked))["cond_latents"] == (CLIPS, 0)


def test_rounded_latents_pass_the_check(tmp_path, npz_manifest, model_without_clip, micro_home):
    settings = config(tmp_path, npz_manifest, model_without_clip, store={"latent_mantissa_bits": 2})
    assert counts(cache_latents.run(settings))["cond_latents"] == (CLIPS, 0)


def test_a_clip_whose_source_is_gone_is_listed_and_stays_in_the_t2v_view(
    tmp_path, model_without_clip, micro_home
):
    data = write_npz_clips(tmp_path / "data", num_clips=3, size=(5, 16, 16))
    cache = tmp_path / "cache"
    cache_latents.run(config(cache, data, "micro"))
    (data.parent / "clip-001.npz").unlink()
    result = cache_latents.run(config(cache, data, model_without_clip, view="i2v"))
    assert (result.exit_code, result.clips) == (3, 2)
    assert [(f.code, f.clip_id[:8]) for f in result.failures] == [("missing", "clip-001")]
    assert counts(result)["cond_latents"] == (2, 0)
    assert cache_latents.run(config(cache, data, "micro")).clips == 3


def test_a_kill_during_conditions_costs_a_segment_and_the_same_command_finishes(
    tmp_path, model_without_clip, micro_home
):
    data = write_npz_clips(tmp_path / "data", num_clips=8, size=(5, 16, 16))
    cache, log = tmp_path / "cache", tmp_path / "log"
    command = (
        "cache-latents", "--manifest", data, "--cache", cache, "--json",
        "--set", "store.clips_per_segment=2", "--model",
    )  # fmt: skip
    cli.run(*command, "micro")
    killed = partial(record_encodings, log, cache=cache, kind="cond_latents", rows=2)
    cli.run(*command, model_without_clip, before=[killed], exit_code=-signal.SIGKILL)
    committed = num_committed(cache)["cond_latents"]
    assert 2 <= committed < 8
    assert read_view(cache, "default").kinds == ("latents", "text")  # still the earlier view
    done = json.loads(cli.run(*command, model_without_clip).stdout)
    assert done["rows"]["cond_latents"]["encoded"] == 8 - committed
    assert done["rows"]["cond_latents"]["cached"] == committed
    assert done["rows"]["latents"]["encoded"] == 0
    assert inspect(InspectConfig(path=cache, verify="full")).exit_code == 0
    assert len(read_view(cache, "default").clips) == 8


def test_a_rank_makes_the_rows_of_every_kind_that_the_others_leave(cache, npz_manifest, model):
    settings = encode_settings.of_config(config(cache, npz_manifest, model))
    hashes = Hashes.read(cache, [npz_manifest])
    plan = planning.find_missing(
        cache,
        planning.make_plan(
            manifest.read_all([npz_manifest]), cache=cache, hashes=hashes, threads=1,
            encoders=find_encoders(settings, hashes),
        ),
    )  # fmt: skip
    total = worker.CommittedOfPlan(cache, plan)
    assert (total.total, total.count()) == (2 * CLIPS, 0)
    made = worker.encode_share(settings, plan, Rank(1, 2), shown=False)
    assert {kind: (each.rows, each.twice) for kind, each in made.clips.items()} == {
        "latents": (0, 0), "cond_latents": (CLIPS, 0), "clip_vision": (CLIPS, 0),
    }  # fmt: skip
    assert total.count() == 2 * CLIPS
    assert not any(total.left().missing_keys.values())


def test_lost_rows_of_a_kind_are_named_and_repaired_alone(
    cache, npz_manifest, model_without_clip, caplog
):
    cache_latents.run(config(cache, npz_manifest, model_without_clip))
    (record,) = cache.glob("store.zarr/cond_latents/*/*/*/zarr.json")
    record.unlink()
    view = read_view(cache, "default")
    with pytest.raises(MissingRowsError, match=f"cond_latents of {CLIPS} clips"):
        StoreReader.of_view(cache, view)
    before = contents(cache)
    with caplog.at_level(logging.INFO, logger="wanlora"):
        result = inspect(InspectConfig(path=cache, repair=True, manifest=(npz_manifest,)))
    assert (result.exit_code, result.repaired["encoded"]) == (0, CLIPS)
    new = contents(cache).keys() - before.keys()
    assert {name.split("/")[1] for name in new} == {"cond_latents"}


def test_only_the_tensors_and_settings_that_decide_an_embedding_count(model, tmp_path):
    def found(change=None) -> str:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("image_encoder", "image_processor"):
            shutil.copytree(model / part, folder / part)
        if change is not None:
            change(folder)
        return fingerprint(
            provenance.clip_vision_provenance(
                folder, store_dtype="float16", transform_revision=1, memo={}
            )
        )

    def tensors(prefix="", **factors: float):
        """Scale tensors, whose names have a prefix or not: releases of transformers differ."""

        def change(folder: Path) -> None:
            path = folder / "image_encoder" / "model.safetensors"
            short = {
                name.removeprefix("vision_model."): value for name, value in load_file(path).items()
            }
            assert {name.replace(".", "_") for name in short} >= factors.keys()
            scaled = {
                prefix + name: value * factors.get(name.replace(".", "_"), 1.0)
                for name, value in short.items()
            }
            save_file(scaled, path, metadata={"format": "pt"})

        return change

    def settings(**changes):
        def change(folder: Path) -> None:
            path = folder / "image_processor" / "preprocessor_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    own = found()
    assert found(tensors()) == found(tensors(prefix="vision_model.")) == own
    assert found(tensors(encoder_layers_2_mlp_fc1_weight=2.0)) == own  # the last layer
    assert found(tensors(encoder_layers_1_mlp_fc1_weight=2.0)) != own
    assert found(tensors(pre_layrnorm_weight=2.0)) != own
    assert found(settings(processor_class="CLIPProcessor")) == own
    assert found(settings(do_center_crop=False)) != own
    assert found(settings(image_mean=[0.5, 0.5, 0.5])) != own


HUB_ENCODERS = """
import os
os.environ["WANLORA_CACHE_HOME"] = "{home}"
from pathlib import Path
from wanlora.commands.cache_latents import encode_settings
from wanlora.commands.cache_latents.find_encoders import find_encoders
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.config import CacheLatentsConfig
config = CacheLatentsConfig(model="org/model", cache=Path("{home}/cache"), device="cpu")
settings = encode_settings.of_config(config)
for dry_run in (True, False, True):
    encoders = find_encoders(settings, Hashes.read(settings.cache), dry_run=dry_run)
    print(len(encoders.stamps), *encoders.kinds)
"""


def test_of_the_hub_only_the_encoders_of_the_variant_are_downloaded(model, tmp_path):
    with serving(model) as (address, downloaded):
        done = first_run(HUB_ENCODERS.format(home=tmp_path), address, tmp_path)
    kinds = "latents text cond_latents clip_vision"
    assert done.stdout.splitlines() == [f"0 {kinds}", f"5 {kinds}", f"5 {kinds}"]
    weights = {name.partition("/")[0] for name in downloaded if name.endswith(".safetensors")}
    assert weights == {"vae", "text_encoder", "image_encoder"}
