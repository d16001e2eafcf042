"""Journal of checked files: each outcome is written at once, so that a killed run continues.

Owns: OUTPUT/.prepare-scan.jsonl. An entry is valid while the file's size and time, and the
way of checking, are the same. It only saves time: the file of a torn or unknown line is checked
again.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wanlora.commands.prepare.check import Checked
from wanlora.core.buckets import Bucket
from wanlora.errors import MediaError, OutputError, PassingError
from wanlora.files import writing
from wanlora.media.frames import DECODER_VERSION
from wanlora.media.image import Picture
from wanlora.media.probe import Scan, VideoInfo
from wanlora.media.scenes import Detector
from wanlora.media.source import SOURCES, parse_hashes
from wanlora.media.timeline import Timeline

NAME = ".prepare-scan.jsonl"
REVISION = 3
"""Revision of `check`; files with entries of another revision are checked again."""


def require_own_files(folder: Path) -> None:
    """Refuse a folder with files of other programs under the names that `prepare` writes.

    Manifests are not checked here (`edits`). With a journal, all of the files are prepare's.

    Raises:
        OutputError: Names the first such file.
    """
    if (folder / NAME).exists():
        return
    for name, is_own in (("errors.jsonl", _is_errors), (SOURCES, _is_hashes)):
        path = folder / name
        if path.exists() and not is_own(path):
            raise OutputError(
                f"{path} was not written by prepare, which writes a file of this name: choose "
                "another folder with --output, or move the file away"
            )


def _is_errors(path: Path) -> bool:
    """Return whether a file holds lines of errors.jsonl; one of a run without errors is empty."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        return all({"code", "stage", "message"} <= row.keys() for row in rows)
    except (ValueError, AttributeError, OSError):
        return False


def _is_hashes(path: Path) -> bool:
    try:
        document = path.read_bytes()
    except OSError:
        return False
    return document.strip() == b"{}" or bool(parse_hashes(document))


class Journal:
    """Entries from before, and an open file for new ones.

    Args:
        folder: Folder of the journal; made if it is missing.
        detector: Detector of scene cuts.
    """

    def __init__(self, folder: Path, detector: Detector) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._how = [REVISION, DECODER_VERSION, detector]
        self._known = _read(folder / NAME)
        self._stamps: dict[Path, list[int] | None] = {}
        self._path = folder / NAME
        self._file = self._path.open("a", encoding="utf-8")
        self._file.write("\n")  # ends the torn line of a killed run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError) if error else writing(self._path):
            self._file.close()

    def recall(self, paths: Sequence[Path]) -> dict[Path, Checked | MediaError]:
        """Return the outcomes of files that have not changed since; reads all stamps."""
        found = {}
        for path in paths:
            self._stamps[path] = _stamp(path)
            entry = self._known.get(str(path))
            if entry and entry["how"] == self._how and entry["stamp"] == self._stamps[path]:
                found[path] = _outcome(entry)
        return found

    def hashes(
        self, outcomes: Mapping[Path, Checked | MediaError]
    ) -> dict[str, tuple[int, int, str]]:
        """Hashes of the files that can be used, by path, size and mtime."""
        return {
            str(path): (stamp[0], stamp[1], outcome.sha256)
            for path, outcome in outcomes.items()
            if isinstance(outcome, Checked) and (stamp := self._stamps.get(path))
        }

    def note(self, path: Path, outcome: Checked | MediaError) -> None:
        """Write an outcome at once, unless another run may have a different one."""
        stamp = self._stamps[path]
        if stamp is None or isinstance(outcome, PassingError):
            return
        entry = {"path": str(path), "stamp": stamp, "how": self._how, **_entry(outcome)}
        with writing(self._path):
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    known = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            entry = json.loads(line)
            _outcome(entry)
            known[entry["path"]] = entry
        except (ValueError, KeyError, TypeError):  # torn by a kill, or of another release
            continue
    return known


def _stamp(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _entry(outcome: Checked | MediaError) -> dict[str, Any]:
    if isinstance(outcome, MediaError):
        return {"error": [outcome.code, str(outcome)]}
    content = outcome.content
    if isinstance(content, Bucket):
        return {"sha256": outcome.sha256, "npz": list(content)}
    kind = "video" if isinstance(content, Scan) else "image"
    return {"sha256": outcome.sha256, kind: _plain(asdict(content))}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(v) if isinstance(v, dict) else str(v) if isinstance(v, Fraction) else v
        for key, v in values.items()
    }


def _outcome(entry: dict[str, Any]) -> Checked | MediaError:
    if "error" in entry:
        return MediaError(*entry["error"])
    if "npz" in entry:
        return Checked(entry["sha256"], Bucket(*entry["npz"]))
    if "image" in entry:
        return Checked(entry["sha256"], Picture(**entry["image"]))
    values = dict(entry["video"])
    info, timeline = values.pop("info"), values.pop("timeline")
    scan = Scan(
        **{**values, "cuts_s": tuple(values["cuts_s"])},
        info=VideoInfo(**{**info, "sample_aspect": Fraction(info["sample_aspect"])}),
        timeline=Timeline(**{**timeline, "time_base": Fraction(timeline["time_base"])}),
    )
    return Checked(entry["sha256"], scan)
