"""Changes to a child process before its work: it counts, records, or kills itself.

A process that sends itself a signal at a named place ends there on any machine; a signal from
another process could come too late on a busy one. The code that runs is the product's: functions
are wrapped, not replaced. Counts are lines or bytes in a file, so a killed process leaves them too.

Must not import the package before a hook runs: `server` shows what a command imports.
"""

import atexit
import itertools
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


def list_modules(path: str | Path) -> None:
    """Write the names of all imported modules to a file when the process ends."""
    atexit.register(lambda: Path(path).write_text("\n".join(sys.modules)))


def count_operations(path: Path, *, kill_at: int | None = None, after: bool = False) -> None:
    """Append a byte to a file before each durable file operation (fsync, rename).

    The process kills itself at operation `kill_at` (from 1), before or after it.
    """
    file, numbers = _appending(path), itertools.count(1)

    def hook(original: Callable, *arguments: Any, **keywords: Any) -> Any:
        os.write(file, b".")
        due = next(numbers) == kill_at
        if due and not after:
            _kill_myself()
        result = original(*arguments, **keywords)
        if due:
            _kill_myself()
        return result

    for name in ("fsync", "rename", "replace"):
        _wrap(os, name, hook)


def record_encodings(
    path: Path, *, cache: Path, kind: str = "latents", rows: int = 0, more: int = 0
) -> None:
    """Append `latents` or `text` to a file before each encoding of a clip or a prompt.

    If `rows` is not 0, the process kills itself before an encoding by the encoder of `kind`: `more`
    encodings after the first at which the cache has that number of committed rows of the kind.
    """
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel

    file, due = _appending(path), itertools.count()
    by = "text" if kind == "text" else "latents"

    def recording(encoded: str) -> Callable:
        def hook(original: Callable, *arguments: Any, **keywords: Any) -> Any:
            seen = rows and encoded == by and num_committed(cache)[kind] >= rows
            if seen and next(due) == more:
                _kill_myself()
            os.write(file, f"{encoded}\n".encode())
            return original(*arguments, **keywords)

        return hook

    _wrap(AutoencoderKLWan, "encode", recording("latents"))
    _wrap(UMT5EncoderModel, "forward", recording("text"))


def num_committed(cache: Path) -> Counter[str]:
    """Committed rows by kind, counted by what a plain JSON reader sees."""
    found: Counter[str] = Counter()
    for kind in ("text", "latents", "cond_latents", "clip_vision"):
        pattern = "*/*/zarr.json" if kind == "text" else "*/*/*/zarr.json"
        for record in (cache / "store.zarr" / kind).glob(pattern):
            found[kind] += json.loads(record.read_text())["attributes"]["wanlora"]["count"]
    return found


def record_calls(path: Path, number: int | None = None, moment: Path | None = None) -> None:
    """Append a line to a file for each collective, with its size, and for each row fetched.

    At its first call after the path `moment` exists, the process sends itself signal `number`.
    """
    import torch.distributed as dist

    from wanlora.store.row_reader import RowReader

    file = _appending(path)

    def recording(describe: Callable[..., str]) -> Callable:
        def hook(original: Callable, *arguments: Any, **keywords: Any) -> Any:
            if number is not None and moment is not None and moment.exists():
                os.kill(os.getpid(), number)
            os.write(file, f"{describe(*arguments)}\n".encode())
            return original(*arguments, **keywords)

        return hook

    _wrap(dist, "all_reduce", recording(lambda tensor: f"all_reduce {tensor.numel()}"))
    _wrap(dist, "all_gather", recording(lambda _, tensor: f"all_gather {tensor.numel()}"))
    _wrap(dist, "monitored_barrier", recording(lambda _: "meet"))
    _wrap(RowReader, "_read_far", recording(lambda _, key: f"fetch {key}"))


def kill_at_publication(point: int, mode: str) -> None:
    """Kill the process at the object of a store that it publishes as number `point`, from 0.

    `mode` is `half-written`, `before-rename` or `after-rename`.
    """
    from wanlora.store import folder

    numbers = itertools.count()

    def hook(publish: Callable, temporary: Path, target: Path) -> None:
        last = next(numbers) == point
        if last and mode == "half-written":
            os.truncate(temporary, temporary.stat().st_size // 2)
        if last and mode != "after-rename":
            _kill_myself()
        publish(temporary, target)
        if last:
            _kill_myself()

    _wrap(folder, "publish", hook)


def _wrap(owner: Any, name: str, hook: Callable) -> None:
    """Call `hook(original, ...)` in place of a function or a method."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        return hook(original, *arguments, **keywords)

    setattr(owner, name, wrapped)


def _appending(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
