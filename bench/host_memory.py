"""Memory, time and output of a command and its children, from outside: Linux only."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 0.1
FIELDS = {"RssAnon": "anonymous", "RssFile": "file_backed", "RssShmem": "shared"}


@dataclass(frozen=True)
class Measured:
    """Time and memory of a command.

    Attributes:
        peak_anonymous: Greatest sum of the processes' own memory: what has no file behind it.
        peak_file_backed: Greatest sum of their mapped pages of files, which the kernel may drop
            and read again: libraries, and weights that are used from the file.
        peak_together: Greatest sum of both, and of shared memory.
        read_from_disk: Bytes that were not in the page cache.
        at_peak: Last line of output when the anonymous memory was greatest.
        longest_silence_s: Longest time without a line of output.
        silent_after: The line before it.
    """

    seconds: float
    cpu_seconds: float
    peak_anonymous: int
    peak_file_backed: int
    peak_together: int
    read_from_disk: int
    at_peak: str
    longest_silence_s: float
    silent_after: str


@dataclass
class _Peaks:
    anonymous: int = 0
    file_backed: int = 0
    together: int = 0
    read: int = 0
    at: str = ""


class _Output:
    """Lines of a process's stderr as they come, the last one, and the longest time without one."""

    def __init__(self, *, echo: bool) -> None:
        self.lines: list[str] = []
        self.longest_s, self.before = 0.0, ""
        self._echo = echo
        self._started = self._last = time.monotonic()

    def read(self, stream: Any) -> None:
        for line in stream:
            self._gap()
            self.lines.append(line.rstrip())
            if self._echo:
                print(f"  {time.monotonic() - self._started:7.1f} s  {self.lines[-1]}", flush=True)
        self._gap()

    def last(self) -> str:
        return self.lines[-1] if self.lines else "(nothing yet)"

    def _gap(self) -> None:
        now = time.monotonic()
        if now - self._last > self.longest_s:
            self.longest_s, self.before = now - self._last, self.last()
        self._last = now


def run(
    command: Sequence[object], *, environment: Mapping[str, str], echo: bool
) -> tuple[int, str, str, Measured]:
    """Run a command; return its exit code, its stdout, its stderr and what it took."""
    started, before = time.monotonic(), os.times()
    process = subprocess.Popen(
        [str(word) for word in command], env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    output, stdout, peaks = _Output(echo=echo), list[str](), _Peaks()
    readers = [
        threading.Thread(target=output.read, args=(process.stderr,)),
        threading.Thread(target=lambda: stdout.append(process.stdout.read())),
    ]
    for thread in readers:
        thread.start()
    while process.poll() is None:
        _sample(process.pid, peaks, output)
        time.sleep(SAMPLE_S)
    for thread in readers:
        thread.join()
    process.stdout.close()
    process.stderr.close()
    after = os.times()
    measured = Measured(
        seconds=time.monotonic() - started,
        cpu_seconds=sum(after[2:4]) - sum(before[2:4]),
        peak_anonymous=peaks.anonymous, peak_file_backed=peaks.file_backed,
        peak_together=peaks.together, read_from_disk=peaks.read, at_peak=peaks.at,
        longest_silence_s=output.longest_s, silent_after=output.before,
    )  # fmt: skip
    return process.returncode, "".join(stdout), "\n".join(output.lines), measured


def _sample(pid: int, peaks: _Peaks, output: _Output) -> None:
    total = dict.fromkeys(FIELDS.values(), 0)
    read = 0
    for each in _tree(pid):
        for name, value in _status(each):
            if name in FIELDS:
                total[FIELDS[name]] += int(value.split()[0]) * 1024
        read += _read_bytes(each)
    if total["anonymous"] > peaks.anonymous:
        peaks.anonymous, peaks.at = total["anonymous"], output.last()
    peaks.file_backed = max(peaks.file_backed, total["file_backed"])
    peaks.together = max(peaks.together, sum(total.values()))
    peaks.read = max(peaks.read, read)


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return [pid]


def _status(pid: int) -> Iterator[tuple[str, str]]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, value = line.partition(":")
        yield name, value


def _read_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)
