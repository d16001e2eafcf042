"""The measurement at full size runs: its parts, and as a whole in its tiny form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import full_model, host_memory
from wanlora.wan.encoders import load_tokenizer, num_prompt_tokens
from wanlora.wan.host_memory import loading_bytes
from wanlora.wan.model_folder import PIPELINE, resolve
from wanlora.wan.variants import VARIANTS, variant_of

SCRIPT = Path(__file__).parents[2] / "bench" / "full_size.py"
CPU = torch.device("cpu")


def test_the_model_is_complete_reused_and_written_again_where_it_is_damaged(tmp_path):
    record = full_model.build(tmp_path, tiny=True)
    folder = resolve(str(tmp_path), PIPELINE)
    assert variant_of(folder).name == record["variant"]
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    for part, num_bytes in record["bytes"].items():
        assert loading_bytes(folder / part, dtype=torch.float32, device=CPU).mapped == num_bytes
    assert num_prompt_tokens(load_tokenizer(folder), "a person") > 2
    files = sorted((folder / "transformer").glob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    assert full_model.build(tmp_path, tiny=True) == record
    files[0].unlink()
    assert full_model.build(tmp_path, tiny=True)["files"] == record["files"]
    after = [file.stat().st_mtime_ns for file in files]
    assert after[0] != before[0]
    assert after[1:] == before[1:]


def test_the_real_configurations_have_the_released_sizes():
    parts = {p.name: p for p in full_model.parts(VARIANTS["t2v-1.3b"], tiny=False)}
    shards = {
        name: len(list(full_model.shards(part.sizes, part.shard_bytes)))
        for name, part in parts.items()
    }
    assert shards == {"vae": 1, "text_encoder": 5, "transformer": 2}
    values = {name: full_model.num_bytes(part.sizes) // 4 for name, part in parts.items()}
    assert values["transformer"] == 1_418_996_800
    assert values["text_encoder"] == 5_680_910_336
    assert "encoder.embed_tokens.weight" not in parts["text_encoder"].sizes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's counters")
def test_memory_of_a_command_is_measured_from_outside():
    program = (
        "import sys, time; print('first', file=sys.stderr, flush=True); held = b'x' * 200_000_000; "
        "time.sleep(1); print('second', file=sys.stderr); print('out'); sys.exit(3)"
    )
    code, out, err, found = host_memory.run(
        [sys.executable, "-c", program], environment={}, echo=False
    )
    assert (code, out, err) == (3, "out\n", "first\nsecond")
    assert found.peak_anonymous > 200_000_000
    assert found.at_peak == found.silent_after == "first"
    assert found.longest_silence_s >= 1


@pytest.mark.slow
def test_the_measurement_runs_in_its_tiny_form(tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--quiet", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    rows = {row["command"]: row for row in json.loads(output.read_text())["commands"]}
    assert {row["exit_code"] for row in rows.values()} == {0}, done.stdout
    imports = rows["(imports alone)"]["peak_anonymous"]
    assert rows["sample"]["peak_anonymous"] > imports / 2
    assert rows["cache-latents"]["predicted"] < 1e6
    assert 1e6 < rows["train"]["predicted"] < 1e8
    assert "export --format merged" in done.stdout
