"""Folders of runs as `wanlora train` leaves them, written without training."""

import json
import math
import socket
import time

import tomli_w

from wanlora.commands.watch.run_files import Folder
from wanlora.commands.watch.summary import Summaries
from wanlora.runs import run_folder

GIF = bytes.fromhex(
    "47494638396108000800800000ff800000000021f90400000000002c00000000080008000002078c8fa9cbed0f05003b"
)


def metrics_row(step, *, loss=None, planned=20, **values):
    loss = 1.0 / (step + 1) + 0.3 if loss is None else loss
    return {
        "step": step, "bucket": "17x64x96", "clips": 1, "loss": loss, "loss_smoothed": loss,
        "lr": 1e-4, "grad_norm": 0.5, "clips_per_s": 2.0, "s_per_step": 0.5, "tflops": 0.01,
        "mfu": None, "data_wait_s": 0.0, "data_wait_pct": 1.0, "peak_memory_gb": 0.5,
        "eta_s": 0.5 * (planned - step - 1),
    } | values  # fmt: skip


def validation_row(step, mean, *, split="val", base=0.5, panel="p", **values):
    return {
        "step": step, "split": split, "weights": "adapter", "panel": panel, "mean": mean,
        "base_mean": base, "difference": mean - base, "standard_error": 0.01,
        "ci95": [mean - base - 0.02, mean - base + 0.02],
        "per_sigma": [[0.2, 0.6, 0.7], [0.8, 0.2, 0.3]], "per_activity": {"walking": [mean, 0.5]},
        "num_clips": 12, "num_groups": 6,
    } | values  # fmt: skip


def status(*, state="done", done=20, planned=20, written_s_ago=0.0, **values):
    now = time.time() - written_s_ago
    return {
        "version": 1, "state": state, "reason": None, "steps_done": done, "steps_planned": planned,
        "host": socket.gethostname(), "started_at": now - 3600, "written_at": now,
        "next_write_s": 60.0, "eta_s": None, "checkpoint": None, "warnings": [],
    } | values  # fmt: skip


def state(run_dir):
    """State of a run, as the list of `wanlora watch` has it."""
    [summary] = Summaries(Folder(run_dir.parent)).of((run_dir.name,))
    return summary.state


def lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write_run(
    folder, *, num_steps=20, planned=20, losses=(0.45, 0.42), rank=16, rate=1e-4, page=None,
    status_values=None, panel="p", prompts=(), settings=None,
):  # fmt: skip
    """Write a run; `status_values` None leaves it without a status, as before release 0.2."""
    folder.mkdir(parents=True)
    values = {"model": "micro", "learning_rate": rate, "lora": {"rank": rank}} | (settings or {})
    (folder / run_folder.CONFIG_NAME).write_text(tomli_w.dumps(values))
    metrics = [
        metrics_row(step, planned=planned, lr=rate, loss=0.4 + math.exp(-step / 8) / rank)
        for step in range(num_steps)
    ]
    (folder / run_folder.METRICS_NAME).write_text(lines(metrics))
    every = max(1, num_steps // max(1, len(losses)))
    rows = [
        validation_row(every * number, loss, panel=panel) for number, loss in enumerate(losses, 1)
    ]
    (folder / run_folder.VALIDATION_NAME).write_text(lines(rows))
    if status_values is not None:
        text = json.dumps(status(done=num_steps, planned=planned) | status_values)
        (folder / run_folder.STATUS_NAME).write_text(text)
    if page is not None:
        (folder / "run.html").write_text(page)
    for index, prompt in enumerate(prompts):
        write_preview(folder / run_folder.PREVIEWS_NAME / f"step-{num_steps:06d}", index, prompt)
    return folder


def write_preview(folder, index, prompt):
    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"__metadata__": {"wanlora.prompt": prompt}}).encode()
    data = len(head).to_bytes(8, "little") + head
    (folder / f"{index:02d}.safetensors").write_bytes(data)
    (folder / f"{index:02d}.gif").write_bytes(GIF)
