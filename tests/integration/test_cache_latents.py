"""Stage one on the micro model: real VAE, real text encoder, real store."""

import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import cli
from tests.support.models import temporary_copy
from wanlora.commands import cache_latents
from wanlora.commands.cache_latents import encode_clips, find_encoders, prefetch
from wanlora.commands.cache_latents import plan as planning
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.commands.inspect import run as inspect
from wanlora.config import CacheLatentsConfig, InspectConfig
from wanlora.data import clip_frames, manifest
from wanlora.data.clip import Clip
from wanlora.errors import DeviceError, ManifestError, ModelError, StoreError
from wanlora.media import source
from wanlora.store.latent_rgb import solve
from wanlora.store.reader import StoreReader
from wanlora.store.views import read_view
from wanlora.wan import encoders
from wanlora.wan.variants import VARIANTS

CAPTIONS = ("a red ball moving left", "a blue cat walking", "a red ball moving left")


def write_clip(path: Path, seed: int, *, size: tuple[int, int, int] = (5, 32, 32)) -> None:
    """A clip of smooth moving colour, saved as .npz."""
    t, y, x = np.meshgrid(*map(np.arange, size), indexing="ij")
    phase = np.random.default_rng(seed).uniform(0, 6, (3, 1, 1, 1))
    waves = np.sin(phase + x / 5 + t / 3 * (1 + seed)) + np.cos(phase * 2 + y / 7)
    frames = np.moveaxis(127 + 60 * waves, 0, -1).clip(0, 255).astype(np.uint8)
    np.savez_compressed(path, frames=frames)


def write_manifest(data: Path, captions: tuple[str, ...] = CAPTIONS) -> Path:
    lines = [
        {"npz": f"clip{i}.npz", "prompt": caption, "activity": "moving"}
        for i, caption in enumerate(captions)
    ]
    (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(len(CAPTIONS)):
        write_clip(folder / f"clip{i}.npz", i)
    return write_manifest(folder)


@pytest.fixture
def config(tmp_path: Path, data: Path, micro_home: Path) -> CacheLatentsConfig:
    return CacheLatentsConfig(
        manifest=(data,),
        cache=tmp_path / "cache",
        model="micro",
        device="cpu",
        validation_prompts=("a dog jumping",),
    )


def changed(config: CacheLatentsConfig, **changes: object) -> CacheLatentsConfig:
    return config.model_copy(update=changes)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each encoder was loaded and used."""
    counts = dict.fromkeys(("encode_latents", "encode_prompts", "load_vae", "load_text_encoder"), 0)
    for name in counts:
        original = getattr(encoders, name)

        def counting(*args: object, original=original, name=name, **kwargs: object) -> object:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(encoders, name, counting)
    return counts


def test_rows_are_what_the_encoders_give_and_the_view_names_them(config, micro_folder):
    result = cache_latents.run(config)
    assert (result.clips, result.clips_encoded, result.exit_code) == (3, 3, 0)
    assert (result.prompts_encoded, result.shared_captions) == (4, 1)  # 2 captions, "", a dog
    view = read_view(config.cache, "default")
    assert (view.sha256, view.model, view.variant) == (result.view_sha256, "micro", "micro")
    reader = StoreReader.of_view(config.cache, view)
    cpu = torch.device("cpu")
    vae = encoders.load_vae(micro_folder, dtype=torch.float32, device=cpu, tf32=False)
    text = encoders.load_text_encoder(micro_folder, dtype=torch.bfloat16, device=cpu)
    found = {clip.clip_id: clip for clip in view.clips}
    for clip in manifest.read_all(config.manifest):
        frames = clip_frames.to_signed(clip_frames.load_clip(clip)).permute(1, 0, 2, 3)[None]
        wanted = encoders.encode_latents(vae, frames)[0].numpy().astype(np.float16)
        assert np.array_equal(reader.latents(found[clip.clip_id].key), wanted)
        (embeds,) = encoders.encode_prompts(text, [clip.prompt])
        (key,) = found[clip.clip_id].prompts
        assert np.array_equal(reader.prompt_embeds(key), embeds.float().numpy().astype(np.float16))
    for key in (view.empty_prompt, view.negative_prompt, view.validation_prompts[0].key):
        assert len(reader.prompt_embeds(key)) >= 1
    projection = solve(*reader.latent_rgb())
    assert projection.shape == (17, 3)
    assert np.isfinite(projection).all()
    assert inspect(InspectConfig(path=config.cache, verify=True)).exit_code == 0
    assert "wanlora train --cache" in "\n".join(result.lines())


def test_a_second_run_encodes_and_loads_nothing_and_leaves_equal_bytes(config, encoded):
    first = cache_latents.run(config)
    encoded.update(dict.fromkeys(encoded, 0))
    files = {p: p.read_bytes() for p in config.cache.rglob("*") if p.is_file()}
    second = cache_latents.run(config)
    assert set(encoded.values()) == {0}
    assert (second.clips_encoded, second.prompts_encoded, second.num_bytes) == (0, 0, 0)
    assert (second.clips_cached, second.prompts_cached) == (3, 4)
    assert second.view_sha256 == first.view_sha256
    assert {p: p.read_bytes() for p in config.cache.rglob("*") if p.is_file()} == files


def test_an_edited_caption_encodes_one_prompt_and_a_copied_clip_nothing(config, data, encoded):
    cache_latents.run(config)
    encoded.update(dict.fromkeys(encoded, 0))
    shutil.copy(data / "clip0.npz", data / "clip3.npz")
    write_manifest(data, ("a green star moving up", *CAPTIONS[1:], CAPTIONS[0]))
    result = cache_latents.run(config)
    assert (encoded["encode_latents"], encoded["encode_prompts"], encoded["load_vae"]) == (
        0,
        1,
        0,
    )
    assert (result.clips, result.clips_encoded, result.duplicate_clips) == (4, 0, 1)
    assert result.prompts_encoded == 1


def test_a_dry_run_counts_and_writes_nothing(config):
    result = cache_latents.run(changed(config, dry_run=True))
    assert (result.clips_encoded, result.prompts_encoded) == (3, 4)
    assert result.num_bytes > 3 * 16 * 2 * 4 * 4 * 2
    assert not config.cache.exists()
    assert "nothing was written" in "\n".join(result.lines())


def test_clips_of_several_sizes_share_a_cache(config, data):
    write_clip(data / "clip2.npz", 9, size=(9, 48, 32))
    assert cache_latents.run(config).clips == 3
    buckets = {row["bucket"] for row in inspect(InspectConfig(path=config.cache)).buckets}
    assert buckets == {"5x32x32", "9x48x32"}


def test_clips_that_cannot_be_used_are_listed_and_the_view_has_the_others(config, data):
    (data / "clip0.npz").unlink()
    (data / "clip1.npz").write_bytes((data / "clip1.npz").read_bytes()[:-300])
    result = cache_latents.run(config)
    assert result.exit_code == 3
    assert {failure.code for failure in result.failures} == {"missing", "bad_npz"}
    view = read_view(config.cache, "default")
    assert [clip.clip_id for clip in view.clips] == ["clip2-" + view.clips[0].clip_id[6:]]
    text = "\n".join(result.lines())
    assert "2 clips not" in text
    assert "clip0" in text


def test_a_clip_damaged_behind_its_header_fails_while_decoding_and_is_listed(config, data):
    path = data / "clip1.npz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    result = cache_latents.run(config)
    assert [failure.code for failure in result.failures] == ["bad_npz"]
    assert (result.clips, result.clips_encoded, result.exit_code) == (2, 2, 3)


def test_nothing_usable_is_an_error_and_no_view(config, data):
    for i in range(3):
        (data / f"clip{i}.npz").unlink()
    with pytest.raises(ManifestError, match="clip0"):
        cache_latents.run(config)
    assert not (config.cache / "views").exists()


def test_a_source_that_is_gone_stays_usable_once_it_is_cached(config, data):
    own = [
        Clip(**{name: getattr(clip, name) for name in Clip.__slots__}
                      | {"source_sha256": source.source_sha256(clip.path)})
        for clip in manifest.read_all([data])
    ]  # fmt: skip
    (data / "train.jsonl").write_bytes(manifest.document(own))
    first = cache_latents.run(config)
    (data / "clip0.npz").unlink()
    second = cache_latents.run(config)
    assert (second.exit_code, second.view_sha256) == (0, first.view_sha256)
    write_clip(data / "clip0.npz", 77)
    third = cache_latents.run(config)
    assert (third.clips_encoded, third.changed_sources) == (1, ["clip0.npz"])


def test_a_source_replaced_before_it_is_decoded_is_listed_and_not_stored(
    config, data, monkeypatch
):  # fmt: skip
    make = planning.make_plan

    def replacing(*arguments: object, **options: object) -> object:
        plan = make(*arguments, **options)
        write_clip(data / "clip1.npz", 55)
        return plan

    monkeypatch.setattr(planning, "make_plan", replacing)
    result = cache_latents.run(config)
    assert [(f.code, f.clip_id[:5]) for f in result.failures] == [("changed", "clip1")]
    assert (result.exit_code, result.clips, result.clips_encoded) == (3, 2, 2)
    monkeypatch.undo()
    assert cache_latents.run(config).clips_encoded == 1


@pytest.mark.parametrize("file", ["vae/config.json", "tokenizer/tokenizer_config.json"])
def test_weights_that_change_between_hashing_and_loading_are_refused(
    config, micro_folder, tmp_path, monkeypatch, file
):  # fmt: skip
    folder = temporary_copy(micro_folder, tmp_path / "model")
    make = planning.make_plan

    def replacing(*arguments: object, **options: object) -> object:
        os.utime(folder / file, ns=(1, 1))
        return make(*arguments, **options)

    monkeypatch.setattr(planning, "make_plan", replacing)
    with pytest.raises(ModelError, match=f"{Path(file).parent} was changed"):
        cache_latents.run(changed(config, model=str(folder)))
    assert not (config.cache / "views").exists()


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_a_stopped_run_keeps_what_it_encoded_and_goes_on_from_there(config, monkeypatch, how):
    original, calls = encoders.encode_latents, []

    def stopping(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            if how == "ctrl-c":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(encoders, "encode_latents", stopping)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        cache_latents.run(config)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (config.cache / "views").exists()
    assert inspect(InspectConfig(path=config.cache, verify=True)).clips == 2
    resumed = cache_latents.run(config)
    assert (resumed.clips_encoded, resumed.clips_cached) == (1, 2)


def test_other_weights_are_another_generation_and_the_log_says_what_differs(
    config, micro_folder, tmp_path, caplog
):  # fmt: skip
    cache_latents.run(config)
    folder = temporary_copy(micro_folder, tmp_path / "model")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["quant_conv.bias"] = tensors["quant_conv.bias"] + 0.25
    save_file(tensors, weights)
    with caplog.at_level(logging.INFO, logger="wanlora"):
        result = cache_latents.run(changed(config, model=str(folder)))
    assert (result.clips_encoded, result.prompts_encoded) == (3, 0)
    assert "(vae_tensors_sha256: found" in caplog.text
    assert read_view(config.cache, "default").model == str(folder)


def test_a_vae_that_cannot_give_a_clip_back_is_refused_before_latents_are_written(
    config, monkeypatch
):
    from dataclasses import replace

    row = VARIANTS["micro"]
    strict = replace(row, vae=replace(row.vae, min_psnr_db=60.0, channel_std_range=(2.0, 3.0)))
    monkeypatch.setattr(find_encoders, "variant_of", lambda folder: strict)
    with pytest.raises(ModelError, match=r"dB PSNR, .* 60 dB; .*latent"):
        cache_latents.run(config)
    assert not list(config.cache.glob("store.zarr/latents/*/*/*"))
    assert not (config.cache / "views").exists()
    assert cache_latents.run(changed(config, decode_check=False)).clips_encoded == 3


def test_a_vae_that_can_is_accepted(config, monkeypatch):
    from dataclasses import replace

    row = VARIANTS["micro"]
    lenient = replace(row, vae=replace(row.vae, min_psnr_db=1.0, channel_std_range=(0.0, 99.0)))
    monkeypatch.setattr(find_encoders, "variant_of", lambda folder: lenient)
    assert cache_latents.run(config).clips_encoded == 3


def test_a_caption_over_512_tokens_is_listed(config, data):
    write_manifest(data, ("a red ball " * 300, *CAPTIONS[1:]))
    result = cache_latents.run(config)
    assert len(result.truncated_prompts) == 1
    assert re.search(r"\b1 prompt .*512 tokens", "\n".join(result.lines()))


def test_a_disk_that_is_too_small_is_refused_before_any_work(config, monkeypatch, encoded):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"\d.*B more, .*\b10 B free"):
        cache_latents.run(config)
    assert set(encoded.values()) == {0}


def test_decoding_runs_ahead_only_so_far_and_keeps_the_order():
    started = []
    ahead = prefetch.Prefetcher(started.append, range(20), threads=2, depth=3)
    results = iter(ahead)
    assert next(results) == (0, None)
    assert len(started) <= 3
    assert [item for item, _ in results] == list(range(1, 20))
    assert sorted(started) == list(range(20))
    ahead.close()


def test_the_queue_is_bounded_by_bytes_and_by_threads():
    assert prefetch.prefetch_depth(97_000_000, threads=4, max_bytes=2**30) == 8
    assert prefetch.prefetch_depth(97_000_000, threads=4, max_bytes=3 * 10**8) == 3
    assert prefetch.prefetch_depth(97_000_000, threads=4, max_bytes=1) == 1


def test_out_of_memory_says_what_to_change_and_keeps_what_is_encoded(config, monkeypatch):
    original, calls = encoders.encode_latents, []

    def full(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*args)

    monkeypatch.setattr(encoders, "encode_latents", full)
    with pytest.raises(DeviceError, match=r"encoding clip clip.* of 5x32x32 .*--set vae_dtype=b"):
        cache_latents.run(config)
    assert inspect(InspectConfig(path=config.cache)).clips == 2


def test_the_way_out_of_too_little_memory_is_one_that_is_open(config, data, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(encoders, "load_text_encoder", full)
    with pytest.raises(DeviceError, match="text encoder") as small:
        cache_latents.run(config)
    with pytest.raises(DeviceError, match="--set text_dtype=bfloat16") as large:
        cache_latents.run(changed(config, text_dtype="float32"))
    assert "text_dtype" not in str(small.value)  # it is bfloat16
    assert "on the CPU" not in str(large.value)  # no run encodes the prompts alone


def test_group_documents_that_are_gone_are_written_anew_without_encoding(config, encoded):
    cache_latents.run(config)
    documents = [
        document
        for lost in ("zarr.json", "latents/zarr.json", "latents/*/zarr.json", "text/*/zarr.json")
        for document in (config.cache / "store.zarr").glob(lost)
    ]
    before = [document.read_bytes() for document in documents]
    encoded.update(dict.fromkeys(encoded, 0))
    for gone in (documents[:1], documents[1:]):
        for document in gone:
            document.unlink()
        assert cache_latents.run(config).exit_code == 0
        assert [document.read_bytes() for document in documents] == before
    assert set(encoded.values()) == {0}


def test_a_dry_run_leaves_the_hashes_of_the_weights_to_the_next_run(
    config, micro_folder, tmp_path
):  # fmt: skip
    folder = temporary_copy(micro_folder, tmp_path / "model")
    cache_latents.run(changed(config, model=str(folder), dry_run=True))
    known = Hashes.read(tmp_path / "another cache").digests
    assert any(str(folder / "vae") in name for name in known)
    assert not config.cache.exists()


def test_an_error_while_writing_behind_the_encoder_stops_the_run(config, monkeypatch):
    def broken(*args: object) -> None:
        raise StoreError("the disk broke")

    monkeypatch.setattr(encode_clips, "_write", broken)
    with pytest.raises(StoreError, match="the disk broke"):
        cache_latents.run(config)
    assert not (config.cache / "views").exists()


def test_rounded_latents_are_stored_on_request(config, micro_folder):
    store = config.store.model_copy(update={"latent_mantissa_bits": 7})
    cache_latents.run(config)
    assert cache_latents.run(changed(config, store=store)).clips_encoded == 3  # its own generation
    view = read_view(config.cache, "default")
    reader = StoreReader.of_view(config.cache, view)
    cpu = torch.device("cpu")
    vae = encoders.load_vae(micro_folder, dtype=torch.float32, device=cpu, tf32=False)
    found = {clip.clip_id: clip for clip in view.clips}
    for clip in manifest.read_all(config.manifest):
        frames = clip_frames.load_clip(clip).permute(1, 0, 2, 3)[None]
        latents = reader.latents(found[clip.clip_id].key)
        assert not (latents.view(np.uint16) & 0b111).any()  # 10 bits of mantissa, 7 are left
        exact = encoders.encode_latents(vae, frames)[0].numpy()
        np.testing.assert_allclose(latents, exact, rtol=2**-8 + 2**-11, atol=1e-4)


def test_float32_storage_is_another_fingerprint(config):
    cache_latents.run(config)
    store = config.store.model_copy(update={"dtype": "float32"})
    result = cache_latents.run(changed(config, store=store))
    assert (result.clips_encoded, result.prompts_encoded) == (3, 4)
    reader = StoreReader.of_view(config.cache, read_view(config.cache, "default"))
    assert reader.latents(read_view(config.cache, "default").clips[0].key).dtype == np.float32


def test_two_uncoordinated_runs_at_once_leave_one_whole_cache(config, data):
    arguments = ("cache-latents", "--manifest", data, "--cache", config.cache, "--model", "micro",
                 "--device", "cpu", "--set", "store.clips_per_segment=1")  # fmt: skip
    runs = [cli.start(*arguments) for _ in range(2)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    found = inspect(InspectConfig(path=config.cache, verify="full"))
    assert (found.clips, found.prompts, found.invalid, found.exit_code) == (3, 3, [], 0)
    again = cache_latents.run(changed(config, validation_prompts=()))
    assert (again.clips_encoded, again.prompts_encoded) == (0, 0)
    inspect(InspectConfig(path=config.cache, gc=True, gc_min_age_h=0))
    clean = inspect(InspectConfig(path=config.cache, verify="full"))
    assert (clean.clips, clean.invalid) == (3, [])
    assert sum(row["rows"] for row in clean.fingerprints) == 6
