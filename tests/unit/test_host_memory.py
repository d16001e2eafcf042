"""Loading the text encoder takes little of the host's memory, or is refused with the number."""

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from wanlora.commands.cache_latents import encode_prompts, encode_settings
from wanlora.commands.cache_latents.find_encoders import Encoders
from wanlora.config import CacheLatentsConfig
from wanlora.errors import DeviceError
from wanlora.processes.turns import turn
from wanlora.training import fitting
from wanlora.wan import encoders, host_memory, pipeline
from wanlora.wan.host_memory import HostBytes, loading_bytes
from wanlora.wan.variants import VARIANTS

CPU = torch.device("cpu")


def local_encoders(folder: Path) -> Encoders:
    return Encoders(folder, VARIANTS["micro"], CPU, {}, {"text_dim": 64})


def test_a_host_with_too_little_memory_is_refused_with_both_numbers(micro_folder, monkeypatch):
    monkeypatch.setattr(host_memory, "free_host_memory", lambda: 7_000_000_000)
    needed = HostBytes(kept=11_400_000_000)
    monkeypatch.setattr(encode_prompts, "loading_bytes", lambda *_, **__: needed)
    monkeypatch.setattr(encoders, "load_text_encoder", lambda *_, **__: pytest.fail("loaded"))
    config = CacheLatentsConfig(model="micro", text_dtype="float32")
    settings = encode_settings.of_config(config)
    with pytest.raises(DeviceError, match=r"11\.4 GB.* 7 GB.*text_dtype=bfloat16"):
        encode_prompts._load_text_encoder(settings, local_encoders(micro_folder))


def test_a_cpu_holds_the_whole_model_and_the_host_of_a_gpu_a_few_tensors(micro_folder):
    model = UMT5EncoderModel.from_pretrained(micro_folder / "text_encoder")
    sizes = sorted((p.numel() for p in model.parameters()), reverse=True)

    def found(where: str, dtype: torch.dtype) -> HostBytes:
        return loading_bytes(micro_folder / "text_encoder", dtype=dtype, device=torch.device(where))

    assert found("cpu", torch.bfloat16) == HostBytes(kept=2 * sum(sizes))
    assert found("cpu", torch.float32) == HostBytes(mapped=4 * sum(sizes))  # as in the file
    assert found("cuda", torch.bfloat16) == HostBytes(kept=2 * sum(sizes[:4]))


def test_weights_in_the_type_of_the_file_stay_in_the_file(micro_folder, tmp_path):
    config = UMT5Config(vocab_size=20_000, d_model=512, d_ff=512, d_kv=64, num_heads=8)
    model = UMT5EncoderModel(config)
    num_bytes = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(micro_folder / "tokenizer", tmp_path / "tokenizer")
    before = host_memory.own_bytes()
    encoder = encoders.load_text_encoder(tmp_path, dtype=torch.float32, device=CPU)
    assert host_memory.own_bytes() - before < num_bytes / 4
    assert torch.equal(encoder.model.shared.weight, model.shared.weight)


def test_files_that_do_not_fit_are_a_warning_with_the_numbers(monkeypatch, caplog):
    monkeypatch.setattr(host_memory, "free_host_memory", lambda: 7_000_000_000)
    host_memory.require_host_memory(HostBytes(1_000_000_000, 5_000_000_000), "work")
    assert not caplog.records
    host_memory.require_host_memory(HostBytes(1_000_000_000, 22_700_000_000), "work", "less")
    [text] = caplog.messages
    for part in ("work", "22.7 GB", "6 GB", "less"):
        assert part in text


def test_a_pipeline_that_the_machine_cannot_hold_is_refused(micro_folder, monkeypatch):
    monkeypatch.setattr(host_memory, "free_host_memory", lambda: 1_000)
    monkeypatch.setattr(pipeline, "load_transformer", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(DeviceError, match=r"needs 6\.02 MB .* 1 kB are free"):
        pipeline.load_pipeline(micro_folder, dtype=torch.bfloat16, device=CPU)


def test_pages_of_files_do_not_raise_what_a_step_may_take(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "free_host_memory", lambda: 0)
    file = tmp_path / "weights"
    file.write_bytes(bytes(100_000_000))
    before = fitting.budget(CPU)
    mapped = torch.from_file(str(file), shared=True, size=100_000_000, dtype=torch.uint8)
    assert int(mapped.sum()) == 0  # every page is read
    assert fitting.budget(CPU) - before < 20_000_000


@pytest.mark.parametrize(
    ("listed", "folder", "names"),
    [
        ("0::/a\n", "a", ("memory.max", "memory.current", "")),
        (
            "9:cpu:/a\n4:memory:/a\n0::/\n", "memory/a",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ),
    ],
    ids=["version 2", "version 1"],
)  # fmt: skip
def test_a_control_groups_limit_is_what_is_free(tmp_path, listed, folder, names):
    groups, group = tmp_path / "cgroup", tmp_path / "root" / folder
    group.mkdir(parents=True)
    groups.write_text(listed)

    def free() -> int:
        return host_memory.free_host_memory(tmp_path / "root", groups)

    unlimited = free()
    limit, used, prefix = names
    for name, text in {
        limit: "3000000", used: "2500000",
        "memory.stat": f"anon 1\n{prefix}active_file 200000\n{prefix}inactive_file 100000\n",
    }.items():  # fmt: skip
        (group / name).write_text(text)
    assert free() == 800_000
    (group / limit).write_text("max\n")
    assert free() == pytest.approx(unlimited, rel=0.5)


def test_processes_of_a_machine_take_turns():
    order: list[str] = []

    def second() -> None:
        with turn("test"):
            order.append("second")

    waiting = threading.Thread(target=second)
    with turn("test"):
        waiting.start()
        time.sleep(0.2)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    with turn("test"):
        pass


def test_a_process_whose_user_has_no_name_takes_turns(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54_321)  # as in a container
    with turn("test"):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's counters")
def test_the_model_does_not_pass_through_host_memory(micro_folder, tmp_path):
    """The meta device takes tensors and holds nothing, so that only the host's part is measured."""
    config = UMT5Config(vocab_size=20_000, d_model=1024, d_ff=2816, d_kv=64, num_heads=16)
    model = UMT5EncoderModel(config).to(torch.bfloat16)
    num_bytes = sum(p.numel() * 2 for p in model.parameters())
    assert num_bytes > 2e8
    model.save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(micro_folder / "tokenizer", tmp_path / "tokenizer")
    del model
    before, peak, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    encoders.load_text_encoder(tmp_path, dtype=torch.bfloat16, device=torch.device("meta"))
    stop.set()
    watching.join()
    assert peak[0] - before < num_bytes / 2


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024
