"""Stage one, with a line in a file for each encoding: run as a program, which may kill itself.

    python -m tests.support.counted_cli LOG CACHE KIND ROWS MORE cache-latents ...

The file still has the counts of a process that was killed. The process sends itself SIGKILL before
an encoding of KIND: MORE encodings after it has seen ROWS committed rows of that kind; never if
ROWS is 0. A kill from another process could come too late on a busy machine. What runs is the
product: the encoders' own methods are wrapped, not replaced.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan
from transformers import UMT5EncoderModel

from wanlora.cli import main

COUNTED = ((AutoencoderKLWan, "encode", "latents"), (UMT5EncoderModel, "forward", "text"))


@dataclass
class Kill:
    """Moment at which the process kills itself."""

    cache: Path
    kind: str
    rows: int
    more: int

    def check(self, kind: str) -> None:
        if kind != self.kind or not self.rows or num_committed(self.cache)[kind] < self.rows:
            return
        if not self.more:
            os.kill(os.getpid(), signal.SIGKILL)
        self.more -= 1


def num_committed(cache: Path) -> dict[str, int]:
    """Committed rows, counted by what a plain JSON reader sees."""
    records = {"text": "text/*/*/zarr.json", "latents": "latents/*/*/*/zarr.json"}
    return {
        kind: sum(
            json.loads(record.read_text())["attributes"]["wanlora"]["count"]
            for record in (cache / "store.zarr").glob(pattern)
        )
        for kind, pattern in records.items()
    }


def count_encodings(log: Path, kill: Kill) -> None:
    """Append `latents` or `text` to a file before each encoding of a clip or a prompt."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for owner, name, kind in COUNTED:
        encode = getattr(owner, name)

        def counted(*args: Any, encode: Any = encode, kind: str = kind, **kwargs: Any) -> Any:
            kill.check(kind)
            os.write(file, f"{kind}\n".encode())
            return encode(*args, **kwargs)

        setattr(owner, name, counted)


if __name__ == "__main__":
    log, cache, kind, rows, more = (sys.argv.pop(1) for _ in range(5))
    count_encodings(Path(log), Kill(Path(cache), kind, int(rows), int(more)))
    main()
