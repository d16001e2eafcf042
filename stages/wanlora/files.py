"""How files appear: whole, or not at all.

Owns: the temporary name, fsync and rename. A temporary name starts with a dot and ends with
`.partial`, so that no reader takes it for the file.
"""

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, a kill or a power cut sees the old one or the new one."""
    temporary = partial_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its name, durably."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_dir(path.parent)


def partial_path(path: Path) -> Path:
    """Temporary name beside a file, its own for each process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def fsync_dir(path: Path) -> None:
    """Make the renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
