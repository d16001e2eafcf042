"""`run.html` and `status.json`, written at intervals while a run trains, and when it ends.

Owns: which files are read, when the page is written, and the state of the run. `report.run_page`
draws the page. A thread writes it, so a long validation or step does not delay it; it reads only
new rows, and converts each picture once.
"""

import io
import json
import logging
import socket
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from wanlora.errors import WanloraError
from wanlora.files import write_json, write_text
from wanlora.report.gallery import Preview, shown_steps
from wanlora.report.run_page import run_page
from wanlora.report.run_status import FAILED, STOPPED, TRAINING
from wanlora.report.series import Metrics
from wanlora.runs import run_folder
from wanlora.runs.saved_latents import read_latents

STATUS_VERSION = 1
FIRST_WAIT_S, MAX_WAIT_S = 2.0, 60.0
"""Seconds between two pages: doubled from the first to the maximum."""
MAX_WARNINGS = 50
MAX_GIF_BYTES = 60_000
"""A larger GIF is converted to WebP, which has a thirteenth of its size (81 frames at 480p)."""

logger = logging.getLogger(__name__)


class RunFiles:
    """Data of a run's page, read from its folder; `read` reads only new rows.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._metrics = Metrics()
        self._offset = 0
        self._pictures: dict[Path, Preview | None] = {}

    @property
    def steps_done(self) -> int:
        """Number of steps, from the newest row of metrics.jsonl."""
        return int(self._metrics.last["step"]) + 1 if self._metrics.last else 0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the newest step; None before the first."""
        return self._metrics.last.get("eta_s")

    def read(self) -> None:
        """Read the rows that were added to metrics.jsonl since the last call."""
        path = self._run_dir / run_folder.METRICS_NAME
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines():
            self._metrics.add(json.loads(line))
        self._offset += whole

    def page(self, status: Mapping[str, Any] | None) -> str:
        """Build the page."""
        config = self._run_dir / run_folder.CONFIG_NAME
        folders = {
            run_folder.step_of(folder): folder
            for folder in run_folder.preview_folders(self._run_dir)
        }
        newest = max(folders, default=None)
        num_prompts = len(list(folders[newest].glob("*.gif"))) if newest is not None else 0
        steps = shown_steps(folders, num_prompts)
        left_out = len(folders) - len(steps)
        return run_page(
            self._run_dir.absolute().name,
            settings=tomllib.loads(config.read_text(encoding="utf-8")) if config.exists() else {},
            metrics=self._metrics,
            validations=run_folder.read_rows(self._run_dir, run_folder.VALIDATION_NAME),
            previews=[each for step in steps for each in self._previews(step, folders[step])],
            note=f"{left_out} of {len(folders)} steps are not shown; "
            f"see {run_folder.PREVIEWS_NAME}/."
            if left_out
            else "",
            status=status,
            resume=run_folder.resume_command(self._run_dir),
        )

    def _previews(self, step: int, folder: Path) -> list[Preview]:
        """Pictures of one step; previews without one (no projection in the store) are left out."""
        gifs = sorted(folder.glob("*.gif"))
        for gif in gifs:
            if gif not in self._pictures:
                self._pictures[gif] = _preview(step, gif)
        return [shown for gif in gifs if (shown := self._pictures[gif])]


def _preview(step: int, gif: Path) -> Preview | None:
    """Read a preview; None, with a warning, if one of its two files is missing or damaged."""
    try:
        prompt = read_latents(gif.with_suffix(".safetensors")).facts["prompt"]
        return Preview(step, prompt, *smaller(gif.read_bytes()))
    except (WanloraError, OSError) as error:
        logger.warning("%s is not shown on %s: %s", gif, run_folder.PAGE_NAME, error)
        return None


def smaller(gif: bytes) -> tuple[bytes, str, tuple[int, int]]:
    """Return a picture for the page, its kind and its size: a large GIF becomes WebP."""
    with Image.open(io.BytesIO(gif)) as image:
        size = image.size
        if len(gif) <= MAX_GIF_BYTES:
            return gif, "gif", size
        buffer = io.BytesIO()
        duration = image.info.get("duration", 100)
        image.save(buffer, "WEBP", save_all=True, duration=duration, loop=0, quality=60, method=2)
    return buffer.getvalue(), "webp", size


class LivePage:
    """The page of a run that is being trained, and the thread that writes it.

    If the page cannot be written, a warning is logged once and training continues.

    Args:
        run_dir: The run's folder.
        steps_planned: Steps of the whole run.
        warnings: Warnings so far; may grow.
    """

    def __init__(self, run_dir: Path, *, steps_planned: int, warnings: list[str]) -> None:
        self._run_dir = run_dir
        self._steps_planned = steps_planned
        self._warnings = warnings
        self._files = RunFiles(run_dir)
        self._started_at = time.time()
        self._host = socket.gethostname()
        self._wake = threading.Condition()
        self._is_due = self._is_over = self._failed = False
        self._thread = threading.Thread(target=self._keep_writing, daemon=True, name="run.html")
        self._write(TRAINING, None, next_write_s=FIRST_WAIT_S)
        self._thread.start()

    def renew(self) -> None:
        """Request that the page is written soon, because there is new data. Returns at once."""
        with self._wake:
            self._is_due = True
            self._wake.notify()

    def end(self, state: str, reason: str | None = None) -> None:
        """Stop the thread and write the page for the last time."""
        with self._wake:
            self._is_over = True
            self._wake.notify()
        self._thread.join()
        self._write(state, reason, next_write_s=None)

    def _keep_writing(self) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            with self._wake:
                early = self._wake.wait_for(lambda: self._is_due or self._is_over, timeout=wait_s)
                if self._is_over:
                    return
                self._is_due = False
            if not early:
                wait_s = min(2 * wait_s, MAX_WAIT_S)
            self._write(TRAINING, None, next_write_s=wait_s)

    def _write(self, state: str, reason: str | None, *, next_write_s: float | None) -> None:
        try:
            self._files.read()
            status = self._status(state, reason, next_write_s)
            write_json(self._run_dir / run_folder.STATUS_NAME, status)
            write_text(self._run_dir / run_folder.PAGE_NAME, self._files.page(status))
        except Exception as error:  # noqa: BLE001  (a page must not end hours of training)
            if not self._failed:
                logger.warning("%s is not written: %s", self._run_dir / run_folder.PAGE_NAME, error)
            self._failed = True

    def _status(self, state: str, reason: str | None, next_write_s: float | None) -> dict[str, Any]:
        checkpoint = run_folder.newest_checkpoint(self._run_dir)
        return {
            "version": STATUS_VERSION,
            "state": state,
            "reason": reason,
            "host": self._host,
            "steps_done": self._files.steps_done,
            "steps_planned": self._steps_planned,
            "started_at": self._started_at,
            "written_at": time.time(),
            "next_write_s": next_write_s,
            "eta_s": self._files.eta_s if state == TRAINING else None,
            "checkpoint": {
                "step": run_folder.step_of(checkpoint),
                "written_at": checkpoint.stat().st_mtime,
            }
            if checkpoint
            else None,
            "warnings": list(self._warnings),
        }


@contextmanager
def live_page(run_dir: Path, *, steps_planned: int, warnings: list[str]) -> Iterator[LivePage]:
    """Keep a run's page up to date inside the block; an error ends it as failed.

    A block without an error calls `end` itself.
    """
    page = LivePage(run_dir, steps_planned=steps_planned, warnings=warnings)
    try:
        yield page
    except KeyboardInterrupt:
        page.end(STOPPED, "interrupted before this step was saved")
        raise
    except BaseException as error:
        named = (
            str(error) if isinstance(error, WanloraError) else f"{type(error).__name__}: {error}"
        )
        page.end(FAILED, named)
        raise


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the texts of warnings that are logged inside the block, each once."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in found and len(found) < MAX_WARNINGS:
                found.append(text)

    handler = Collector(logging.WARNING)
    package = logging.getLogger("wanlora")
    package.addHandler(handler)
    try:
        yield found
    finally:
        package.removeHandler(handler)
