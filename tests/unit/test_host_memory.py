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
from wanlora.wan import device, encoders
from wanlora.wan.variants import VARIANTS

CPU = torch.device("cpu")


def local_encoders(folder: Path) -> Encoders:
    return Encoders(folder, VARIANTS["micro"], CPU, {}, {"text_dim": 64})


def test_a_host_with_too_little_memory_is_refused_with_both_numbers(micro_folder, monkeypatch):
    monkeypatch.setattr(device, "free_host_memory", lambda: 7_000_000_000)
    monkeypatch.setattr(encoders, "text_encoder_host_bytes", lambda *_, **__: 11_400_000_000)
    monkeypatch.setattr(encoders, "load_text_encoder", lambda *_, **__: pytest.fail("loaded"))
    config = CacheLatentsConfig(model="micro", text_dtype="float32")
    settings = encode_settings.of_config(config)
    with pytest.raises(DeviceError, match=r"11\.4 GB.* 7 GB.*text_dtype=bfloat16"):
        encode_prompts._load_text_encoder(settings, local_encoders(micro_folder))


def test_a_cpu_holds_the_whole_model_and_the_host_of_a_gpu_a_few_tensors(micro_folder):
    model = UMT5EncoderModel.from_pretrained(micro_folder / "text_encoder")
    sizes = sorted((p.numel() for p in model.parameters()), reverse=True)

    def host_bytes(where: str, dtype: torch.dtype) -> int:
        return encoders.text_encoder_host_bytes(
            micro_folder, dtype=dtype, device=torch.device(where)
        )

    assert host_bytes("cpu", torch.bfloat16) == 2 * sum(sizes)
    assert host_bytes("cpu", torch.float32) == 4 * sum(sizes)
    assert host_bytes("cuda", torch.bfloat16) == 2 * sum(sizes[:4])


def test_a_control_groups_limit_is_what_is_free(tmp_path):
    unlimited = device.free_host_memory(tmp_path)
    for name, text in {
        "memory.max": "3000000", "memory.current": "2500000",
        "memory.stat": "anon 1\nactive_file 200000\ninactive_file 100000\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    assert device.free_host_memory(tmp_path) == 800_000
    (tmp_path / "memory.max").write_text("max\n")
    assert device.free_host_memory(tmp_path) == pytest.approx(unlimited, rel=0.5)


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
