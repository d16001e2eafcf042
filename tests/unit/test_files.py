"""A disk that takes no more data is one refusal, whichever library was writing."""

import errno
import resource
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from wanlora import cli
from wanlora.errors import OutputError
from wanlora.files import disk_error, staging, write_atomic, write_json, writing
from wanlora.media import mp4, recorded
from wanlora.report.page import page
from wanlora.runs import checkpoints, publish, run_folder
from wanlora.runs.record import Recorder
from wanlora.training.masters import Masters

LIMIT = 5_000
NOISE = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)


@contextmanager
def small_files():
    """Let no file grow over LIMIT bytes; pytest's own log may be one, so only within a test."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def optimizer_state(path):
    masters = Masters({"m.lora_A.weight": torch.nn.Parameter(torch.zeros(LIMIT))})
    optimizer = torch.optim.AdamW(masters.parameters.values())
    optimizer.step()

    def write(folder):
        checkpoints.write_state(
            folder, progress=checkpoints.Progress(step=7), identity={}, facts={},
            masters=masters, optimizer=optimizer, attention="flash",
        )  # fmt: skip

    publish.publish_checkpoint(path.parent, 7, write, keep=0)


def merged(path):
    with staging(path) as folder:
        safetensors.torch.save_file({"a": torch.zeros(LIMIT)}, folder / "x.safetensors")


def metrics(path):
    for step in range(LIMIT):
        run_folder.append_row(path.parent, path.name, {"step": step})


def tensorboard(path):
    recorder = Recorder(path.parent, ["tensorboard"], {}, first_step=0)
    try:
        for step in range(LIMIT):
            recorder.step({"step": step, "loss": 0.5})
    finally:
        recorder.close()


WRITERS = {
    "a.html": lambda path: write_atomic(path, page("a page", ["x" * LIMIT]).encode()),
    "a.json": lambda path: write_json(path, ["x" * LIMIT]),
    "a.mp4": lambda path: mp4.write(path, NOISE, fps=16),
    "a.webm": lambda path: mp4.write(path, NOISE, fps=16, codec=mp4.VP9),
    "frames": lambda path: recorded._write_frames(path, NOISE, fps=16, metadata={}),
    "a.gif": lambda path: recorded._write_gif(path, NOISE, fps=16, metadata={"comment": ""}),
    "step-000007": optimizer_state,
    "merged": merged,
    "metrics.jsonl": metrics,
    "tensorboard": tensorboard,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_names_the_file_and_the_reason(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(threading, "excepthook", cli._report_thread)  # TensorBoard's writer
    with small_files(), pytest.raises(OutputError) as refused:
        WRITERS[name](tmp_path / name)
    assert f"{name}: File too large" in str(refused.value)
    assert "Traceback" not in capfd.readouterr().err
    left = [path.name for path in tmp_path.rglob("*") if "partial" in path.name]
    assert not left
    if name not in {"metrics.jsonl", "tensorboard"}:  # these grow, the others appear whole
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_the_reason_is_found_in_every_form(number, tmp_path):
    rust = safetensors.SafetensorError(f"I/O error: whatever (os error {number})")
    stream = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    stream.__context__ = OSError(number, "whatever")
    for error in (OSError(number, "whatever"), rust, stream):
        with pytest.raises(OutputError, match=r"a\.bin"), writing(tmp_path / "a.bin"):
            raise error


def test_torch_reports_a_device_that_is_full():
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises((OSError, RuntimeError)) as raised,
    ):
        torch.save({"a": torch.zeros(100_000)}, full)
    assert disk_error(raised.value) == "No space left on device"


def test_any_other_error_passes_unchanged(tmp_path):
    for error in (ValueError("x"), RuntimeError("shape"), FileNotFoundError(2, "no such file")):
        with pytest.raises(type(error)) as raised, writing(tmp_path):
            raise error
        assert raised.value is error
