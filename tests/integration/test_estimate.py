"""`wanlora estimate` answers for a cache or for numbers, for a card by name or by a probe."""

import json
import re
import shutil

import pytest

from tests.support import cli
from tests.support.experts import pair_folder
from tests.support.stores import build_store
from wanlora.core.buckets import Bucket
from wanlora.training import fitting


def estimate(*arguments):
    result = cli.invoke("estimate", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_users_own_job_on_an_h100():
    found = estimate("--clips", 8000, "--device", "h100", "--set", "lora.targets=attention")
    assert found["tflop_per_step"] == pytest.approx(870.2, rel=1e-3)
    assert found["floor_s"] == pytest.approx(1.52, abs=0.01)
    assert found["floor_s"] < found["seconds_per_step"] < 2
    assert found["mfu"] == pytest.approx(870.2 / 989.4 / found["seconds_per_step"], rel=1e-3)
    modes = found["modes"]
    peaks = {name: mode["peak_gb"] for name, mode in modes.items()}
    assert sorted(peaks, key=peaks.get) == ["offload", "full", "selective", "none"]
    assert all(mode["fits"] for mode in modes.values())
    assert found["hours_per_epoch"] == pytest.approx(8000 * found["seconds_per_step"] / 3600)
    pauses = found["validation"]["hours"] + found["previews"]["hours"]
    assert found["hours"] == pytest.approx(10 * found["hours_per_epoch"] + pauses)
    assert found["stage_one_hours"] == pytest.approx(8000 * 1.51 / 3600, rel=0.01)
    assert found["cache_gb"] == pytest.approx(8000 * 4.81e-3, rel=0.01)
    assert not found["measured"]


def test_the_hours_of_a_run_have_a_row_for_validation_and_for_previews():
    """256 passes of 283 TFLOP take at least 114 s of an H100, every 500 of 80,000 steps."""
    job = ("--clips", 8000, "--device", "h100")
    found = estimate(*job)
    validation = found["validation"]
    assert validation["times"] == 160
    assert validation["forward_passes"] == 161 * 256
    assert 114 < 3600 * validation["hours"] / 161 < 200
    assert 0.1 < validation["hours"] / found["hours"] < 0.2
    assert found["previews"] == {"times": 0, "forward_passes": 0, "hours": 0}
    never = estimate(*job, "--set", "validation.every=0")
    assert never["hours"] == pytest.approx(found["hours"] - validation["hours"])
    two = estimate(*job, "--set", "gradient_accumulation_steps=2", "--num-processes", 2)
    assert two["validation"]["hours"] == pytest.approx(81 / 161 * validation["hours"] / 2)
    held_out_only = estimate(*job, "--set", "validation.train_clips=false")["validation"]
    assert held_out_only["forward_passes"] == 161 * 128
    own = estimate(*job, "--preview-prompt", "a", "--preview-prompt", "b")["previews"]
    assert own["forward_passes"] == (160 + 1) * 2 * 20 * 2
    previews = ("--set", "previews.every=500", "--set", "previews.num_prompts=1")
    shown = estimate(*job, *previews)["previews"]
    assert shown["forward_passes"] == (160 + 1) * 20 * 2
    assert shown["hours"] > 0
    table = cli.invoke("estimate", *job, *previews).stdout
    assert "validation" in table
    assert "previews" in table


def test_weights_and_buckets_without_a_step_are_counted_as_training_does(tmp_path):
    build_store(tmp_path, num_clips=8, buckets=(Bucket(17, 64, 64), Bucket(1, 64, 64)))
    plain = estimate("--cache", tmp_path, "--num-epochs", 1)
    assert (plain["steps"], plain["untrained"]) == (7, [])
    # The moving clips are of one activity here, the images of the other.
    heavy = estimate("--cache", tmp_path, "--num-epochs", 1, "--set", "clip_weights.walking=3")
    assert heavy["steps"] == 15
    assert heavy["clips_per_step"] == 1
    grouped = ("--gradient-accumulation-steps", 8, "--batch-by", "cost", "--num-epochs", 1)
    (untrained,) = estimate("--cache", tmp_path, *grouped)["untrained"]
    assert "1x64x64" in untrained
    assert "--num-epochs" in untrained
    assert "walking" in cli.refuses(
        "estimate", "--cache", tmp_path, "--set", "clip_weights.x=2", exit_code=2
    )
    assert "--cache" in cli.refuses("estimate", "--set", "clip_weights.x=2", exit_code=2)


def test_a_step_of_more_clips_takes_as_many_times_as_long():
    never = ("--set", "validation.every=0")
    one = estimate("--clips", 80, *never)
    eight = estimate("--clips", 80, "--gradient-accumulation-steps", 8, *never)
    assert eight["seconds_per_step"] == pytest.approx(8 * one["seconds_per_step"])
    assert eight["tflop_per_step"] == pytest.approx(8 * one["tflop_per_step"])
    assert eight["hours"] == pytest.approx(one["hours"])
    assert eight["steps"] == one["steps"] / 8


def test_processes_share_a_step_and_send_the_adapters_gradient():
    step = ("--clips", 80, "--set", "lora.targets=attention", "--gradient-accumulation-steps", 8)
    one, four = estimate(*step), estimate(*step, "--num-processes", 4)
    assert four["seconds_per_step"] == pytest.approx(one["seconds_per_step"] / 4)
    assert four["hours"] == pytest.approx(one["hours"] / 4)
    for same in ("clips_per_step", "tflop_per_step", "steps", "mfu", "peak_gb"):
        assert four[same] == pytest.approx(one[same])
    # Three parts of four are sent to sum the gradient, and as many to hand the sum around.
    assert four["sent_bytes_per_step"] == 2 * 3 * 4 * four["trained_parameters"] // 4
    assert one["sent_bytes_per_step"] == 0
    text = cli.invoke("estimate", *step, "--num-processes", 4).output
    assert re.search(r"between GPUs +142 MB .* 3 ms at 50 GB/s", text)
    assert "multiple of num_processes, 3" in cli.refuses(
        "estimate", *step, "--num-processes", 3, exit_code=2
    )


def test_small_cards():
    """24 GB: the full size with attention kept. 16 GB: shorter clips, or full recomputation."""
    assert estimate("--device", "rtx4090")["modes"]["selective"]["fits"]
    small = estimate("--device", "rtx4090", "--memory-gb", 16)["modes"]
    assert small["full"]["fits"]
    assert not small["selective"]["fits"]
    assert 49 <= small["selective"]["longest"] < 81


@pytest.mark.parametrize(
    ("device", "memory"), [(("5080",), 16), (("voodoo2", "--memory-gb", 12), 12)]
)
def test_a_card_without_known_rates_is_answered_for_memory(device, memory):
    job = ("--clips", 8000, "--set", "previews.every=500", "--num-processes", 2)
    job += ("--set", "gradient_accumulation_steps=2", "--frames", 17, "--frames", 49)
    found = estimate("--device", *device, *job)
    assert memory - 3 < found["memory_gb"] < 1.08 * memory
    assert found["modes"]["full"]["peak_gb"] > 0
    assert found["cache_gb"] > 1
    for unknown in ("seconds_per_step", "hours", "hours_per_epoch", "mfu", "floor_s"):
        assert found[unknown] is None
    assert found["validation"]["hours"] is None
    table = cli.invoke("estimate", "--device", *device, *job).stdout
    assert "time not known" in table
    assert "None" not in table
    assert "nan" not in table


def test_numbers_are_in_units_of_their_size(cache_fp16):
    """A tiny cache takes seconds and kilobytes, not 0.0503 h and 0.000832 GB."""
    table = cli.invoke("estimate", "--cache", cache_fp16, "--device", "h100").stdout
    assert not re.search(r"\d(e-\d|\.\d{5})|\b0\.0\d* ([hG]|min)", table)
    assert re.search(r"epoch +(\d+|under 1) ms", table)


def test_the_14b_model():
    found = estimate("--variant", "t2v-14b", "--device", "h100")
    assert found["fits"]
    assert not found["modes"]["none"]["fits"]


def test_two_experts_are_two_runs_and_the_figures_are_those_of_one():
    job = ("--clips", 1000, "--device", "h200")
    one = estimate("--variant", "t2v-14b", *job)
    either = estimate("--variant", "t2v-a14b", *job)
    assert (either["variant"], either["expert"], either["num_experts"]) == ("t2v-a14b", None, 2)
    same = ("tflop_per_step", "peak_gb", "modes", "hours", "trained_parameters", "checkpoints_gb")
    assert {name: either[name] for name in same} == {name: one[name] for name in same}
    assert one["num_experts"] == 1
    assert one["hours_of_experts"] == one["hours"]
    assert either["hours_of_experts"] == 2 * either["hours"]
    for expert in ("high", "low"):
        found = estimate("--variant", "t2v-a14b", "--expert", expert, *job)
        assert found == either | {"expert": expert}
    table = cli.invoke("estimate", "--variant", "t2v-a14b", "--expert", "low", *job).stdout
    assert re.search(r"^t2v-a14b, .*low.* on H200", table)
    hours = {name: re.search(rf"^{name} .*", table, re.MULTILINE) for name in ("the run", "both")}
    assert all(hours.values()), table
    assert "--expert low" in cli.refuses("estimate", "--variant", "t2v-14b", "--expert", "low")


def test_image_to_video_models_are_estimated_with_their_conditions():
    job = ("--clips", 1000, "--device", "h200")
    t2v, pair, clip = (
        estimate("--variant", name, *job) for name in ("t2v-14b", "i2v-a14b", "i2v-14b")
    )
    # 20 more input channels in the patch convolution, which has no backward pass.
    patch = 2 * 32_760 * 20 * 4 * 5120 / 1e12
    assert pair["tflop_per_step"] - t2v["tflop_per_step"] == pytest.approx(patch, rel=1e-3)
    assert (pair["num_experts"], clip["num_experts"]) == (2, 1)
    weights = 1e9 * (16.395 - 14.288) * 2 / 1e9
    grown = clip["modes"]["full"]["peak_gb"] - t2v["modes"]["full"]["peak_gb"]
    assert grown == pytest.approx(weights, abs=1.6)  # and the adapter of 80 more modules
    condition = 1000 * 16 * 21 * 60 * 104 * 2 / 1e9
    assert pair["cache_gb"] - t2v["cache_gb"] == pytest.approx(condition)
    assert clip["cache_gb"] - pair["cache_gb"] == pytest.approx(1000 * 257 * 1280 * 2 / 1e9)
    assert pair["stage_one_hours"] == pytest.approx(2 * t2v["stage_one_hours"], rel=0.01)
    low = estimate("--variant", "i2v-a14b", "--expert", "low", *job)
    assert low == pair | {"expert": "low"}


@pytest.mark.parametrize("variant", ["t2v-14b", "t2v-a14b"])
def test_720p_of_a_14b_transformer_fits_80_gb_with_inputs_in_host_memory(variant):
    size = ("--height", 720, "--width", 1280)
    found = estimate("--variant", variant, *size, "--device", "h100")
    assert found["tflop_per_step"] == pytest.approx(20_161, abs=0.5)
    assert {name for name, mode in found["modes"].items() if mode["fits"]} == {"offload"}
    assert found["fits"]
    assert found["modes"]["full"]["peak_gb"] == pytest.approx(88.8, abs=0.06)
    assert found["modes"]["offload"]["peak_gb"] == pytest.approx(59.4, abs=0.06)
    assert found["modes"]["full"]["longest"] < 81
    assert estimate("--variant", variant, *size, "--device", "h200")["fits"]


def test_a_probe_of_a_model_with_two_experts_needs_the_name_of_one(tmp_path):
    pair = pair_folder(tmp_path / "pair")
    job = ("--model", pair, "--probe", "--device", "cpu", "--frames", 5, "--height", 64,
           "--width", 64)  # fmt: skip
    refusal = cli.refuses("estimate", *job)
    assert "--expert high" in refusal
    assert "wanlora train" not in refusal
    shutil.rmtree(pair / "transformer")  # only the low-noise expert can be measured now
    found = estimate(*job, "--expert", "low")
    assert (found["variant"], found["expert"]) == ("micro-a14b", "low")
    assert found["measured"]


def test_previews_of_an_expert_are_refused_as_train_refuses_them():
    job = ("estimate", "--variant", "t2v-a14b", "--device", "h100")
    message = cli.refuses(*job, "--preview-every", 10, exit_code=2)
    assert "wanlora sample" in message
    assert "--preview-prompt" in cli.refuses(*job, "--preview-prompt", "a dog", exit_code=2)


def test_a_cache_says_its_clips_and_what_it_takes_on_disk(cache_fp16):
    found = estimate("--cache", cache_fp16)
    assert found["variant"] == "micro"
    assert found["buckets"] == {"9x32x48": 6}
    on_disk = sum(f.stat().st_size for f in (cache_fp16 / "store.zarr").rglob("*") if f.is_file())
    assert found["cache_gb"] == pytest.approx(on_disk / 1e9)


def test_a_probe_measures_on_this_machine(cache_fp16, monkeypatch):
    original, reserved = fitting.fit, []

    def fit(*arguments, reserved_bytes, **options):
        reserved.append(reserved_bytes)
        return original(*arguments, **options)

    monkeypatch.setattr(fitting, "fit", fit)
    found = estimate("--cache", cache_fp16, "--probe", "--device", "cpu")
    # What a run holds in a step beside the model: masters, gradients and moments; uploaded clips.
    assert reserved[0] > 16 * found["trained_parameters"]
    assert found["measured"]
    assert found["seconds_per_step"] == pytest.approx(found["probe"]["seconds"])
    assert found["probe"]["attention"] == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert found["mfu"] is None


def test_the_table_says_that_it_is_a_prediction():
    result = cli.invoke("estimate", "--clips", 8000, "--device", "h100")
    assert "predicted, not measured" in result.stdout
    assert "assumed: attention: 60%" in result.stdout
    assert "longest clip" in result.stdout


def test_what_cannot_be_estimated_is_refused(tmp_path):
    unknown = cli.refuses("estimate", "--device", "voodoo2", exit_code=2)
    assert "RTX 4090" in unknown
    assert "--memory-gb" in unknown
    other = cli.refuses("estimate", "--device", "RTX 4090 48GB", exit_code=2)
    assert "--memory-gb 48" in other
    assert "use 77 or 81" in cli.refuses("estimate", "--frames", 80, exit_code=2)
    assert "--variant" in cli.refuses("estimate", "--model", "micro", exit_code=2)
    for wrong in ("stream_blocks=foo", "stream_blocks=-1"):
        message = cli.refuses("estimate", "--device", "h100", "--set", wrong, exit_code=2)
        assert "auto" in message
        assert "literal" not in message
    fewer = cli.refuses(
        "estimate", "--device", "h100", "--variant", "t2v-14b", "--set", "stream_blocks=99",
        exit_code=2,
    )  # fmt: skip
    assert "--stream-blocks 40" in fewer
    nothing = cli.refuses("estimate", "--probe", "--device", "cpu", exit_code=2)
    assert "--probe runs a model" in nothing
    cli.refuses("estimate", "--cache", tmp_path / "none")
