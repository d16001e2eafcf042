"""The folder of a demo: its identity, and the steps that are done.

Owns: `demo.json`, with the version, the settings, the base model, the steps that ended, and the
result. Must not know what a step does.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wanlora.core.fingerprint import difference
from wanlora.errors import RunError
from wanlora.files import foreign_files, require_folder, write_json

NAME = "demo.json"


@contextmanager
def open_folder(root: Path, identity: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Create the folder of a demo or open an existing one, and keep other processes out of it.

    Args:
        root: The folder.
        identity: Version, settings and base model; a demo of others is not continued.

    Yields:
        The content of `demo.json`: `identity`, `done` (names of steps) and `result`.

    Raises:
        RunError: The folder has files of something else, or another demo's; or another process
            uses it.
        OutputError: The folder cannot be written.
    """
    require_folder(root, flag="--output-dir")
    if not (root / NAME).exists() and (others := foreign_files(root)):
        raise RunError(
            f"{root} holds {', '.join(others[:3])} and not a demo of this version: choose a new or "
            "empty folder with --output-dir"
        )
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock", timeout=0):
            record = _read(root / NAME) or {"identity": identity, "done": [], "result": None}
            if differing := difference(record["identity"], identity):
                raise RunError(
                    f"{root} holds a demo of another version or with other settings:\n  "
                    + "\n  ".join(differing)
                    + "\ndelete the folder, or choose another --output-dir"
                )
            write_json(root / NAME, record)
            yield record
    except Timeout:
        raise RunError(
            f"another process runs a demo in {root}: wait for it to end, or choose another "
            "--output-dir"
        ) from None


def mark_done(root: Path, record: dict[str, Any], step: str) -> None:
    """Record that a step ended. The steps after it are to be done again."""
    record["done"] = [name for name in record["done"] if name != step] + [step]
    write_json(root / NAME, record)


def _read(path: Path) -> dict[str, Any] | None:
    """Content of `demo.json`; None without one."""
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("identity", "done", "result")}
    except (ValueError, TypeError, KeyError):
        raise RunError(
            f"{path} cannot be read as the record of a demo: delete the folder, or choose "
            "another --output-dir"
        ) from None
