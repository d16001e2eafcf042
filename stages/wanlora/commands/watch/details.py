"""Data of a run for its pages, read from its folder; damaged parts are left out.

Owns: which files are read, and the cache of metrics. Must not know: HTML, HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wanlora.commands.watch import records
from wanlora.commands.watch.records import Row
from wanlora.commands.watch.run_files import Folder, Version
from wanlora.commands.watch.summary import Summary
from wanlora.core.units import count
from wanlora.report.series import Metrics
from wanlora.runs import run_folder

MAX_CACHED = 16
"""Maximum number of runs with metrics in memory: 8 MB for 100,000 steps."""
TAIL_BYTES = 512
"""Number of bytes compared at the end of the part that was read, to find a replaced file."""
MAX_HEAD_BYTES = 2**20
MAX_PICTURE_BYTES = 20 * 2**20


@dataclass(frozen=True, slots=True)
class Picture:
    """Newest preview of a prompt, as a GIF."""

    step: int
    gif: bytes


@dataclass(frozen=True, slots=True)
class RunData:
    """Data of a run for its pages.

    Attributes:
        summary: Its line in the list.
        settings: As in config.toml, nested.
        metrics: Rows of metrics.jsonl.
        validations: Rows of validation.jsonl.
        pictures: Newest preview by prompt.
        notes: Parts of its files that cannot be shown.
    """

    summary: Summary
    settings: Mapping[str, Any]
    metrics: Metrics
    validations: Sequence[Row]
    pictures: Mapping[str, Picture]
    notes: Sequence[str]


class _Metrics:
    """Content of a metrics.jsonl up to the position that was read."""

    def __init__(self) -> None:
        self.columns = Metrics()
        self.num_damaged = 0
        self.version: Version | None = None
        self.end = 0
        self.tail = b""

    def add(self, data: bytes) -> None:
        """Add the whole lines of what follows."""
        whole = data[: data.rfind(b"\n") + 1]
        read = records.metrics_rows(whole)
        for row in read.rows:
            self.columns.add(row)
        self.num_damaged += read.num_damaged
        self.end += len(whole)
        self.tail = (self.tail + whole)[-TAIL_BYTES:]


class Details:
    """Data of the runs in a folder. Of metrics, only new rows are read. Not for several threads.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._metrics: dict[str, _Metrics] = {}

    def of(self, summary: Summary) -> RunData:
        """Read a run."""
        name = summary.name
        metrics = self._read_metrics(name)
        validations = records.validation_rows(self._read(f"{name}/{run_folder.VALIDATION_NAME}"))
        files = (
            (run_folder.METRICS_NAME, metrics.num_damaged),
            (run_folder.VALIDATION_NAME, validations.num_damaged),
        )
        return RunData(
            summary=summary,
            settings=records.settings(self._read(f"{name}/{run_folder.CONFIG_NAME}")),
            metrics=metrics.columns,
            validations=validations.rows,
            pictures=self._pictures(name),
            notes=[
                f"{count(damaged, 'damaged line')} of {file} cannot be read"
                for file, damaged in files
                if damaged
            ],
        )

    def _read_metrics(self, name: str) -> _Metrics:
        known = self._metrics.pop(name, _Metrics())
        self._metrics[name] = known  # the most recently used is dropped last
        while len(self._metrics) > MAX_CACHED:
            del self._metrics[next(iter(self._metrics))]
        path = f"{name}/{run_folder.METRICS_NAME}"
        version = self._folder.version(path)
        if known.version == version:
            return known
        data = self._folder.read(path, start=known.end - len(known.tail)) or b""
        if not data.startswith(known.tail):  # a resume has replaced the file
            known = self._metrics[name] = _Metrics()
            data = self._folder.read(path) or b""
        known.add(data[len(known.tail) :])
        known.version = version
        return known

    def _pictures(self, name: str) -> dict[str, Picture]:
        """Newest preview of each prompt. A preview whose prompt cannot be read is left out."""
        steps = self._folder.folders(f"{name}/{run_folder.PREVIEWS_NAME}")
        numbered = [step for step in steps if step.removeprefix("step-").isdecimal()]
        if not numbered:
            return {}
        newest = max(numbered, key=lambda step: int(step.removeprefix("step-")))
        folder = f"{name}/{run_folder.PREVIEWS_NAME}/{newest}"
        found = {}
        for file in self._folder.files(folder):
            stem = file.removesuffix(".gif")
            if stem == file:
                continue
            head = self._folder.read_start(f"{folder}/{stem}.safetensors", MAX_HEAD_BYTES)
            prompt = records.preview_prompt(head or b"")
            gif = self._folder.read(f"{folder}/{file}", max_bytes=MAX_PICTURE_BYTES)
            if prompt is not None and gif is not None:
                found[prompt] = Picture(int(newest.removeprefix("step-")), gif)
        return found

    def _read(self, path: str) -> bytes:
        return self._folder.read(path) or b""
