"""Work for processes that die or hang on some files; importable by the processes."""

import os
import sys
import time
from pathlib import Path


def size_or_die(path: Path, alive) -> int:
    if "die" in path.name:
        os._exit(11)
    if "hang" in path.name:
        time.sleep(600)
    if "slow" in path.name:
        for _ in range(30):
            time.sleep(0.1)
            alive()
    return path.stat().st_size


def has_torch(path: Path, alive) -> bool:
    return "torch" in sys.modules
