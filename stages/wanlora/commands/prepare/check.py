"""Check a source file: hash it and decode all of it.

Owns: the work of one process, and the choice of temporary errors. Imports no torch: these processes
must start quickly. Must not know: how files are distributed (`pool`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wanlora.core.buckets import Bucket
from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.data import npz
from wanlora.data.captions.folders import IMAGE_SUFFIXES
from wanlora.errors import MediaError, PassingError
from wanlora.media import image, probe
from wanlora.media.scenes import Detector
from wanlora.media.source import reading, source_sha256, unchanged
from wanlora.processes.pool import Heartbeat, map_in_processes

Content = probe.Scan | image.Picture | Bucket
"""Measurements of a video, an image, or the size of an .npz clip."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A source file that decodes from end to end."""

    sha256: str
    content: Content


def check(path: Path, alive: Heartbeat, *, detector: Detector) -> Checked | MediaError:
    """Hash a file and decode all of it; a problem is returned, not raised.

    Returns:
        Facts about the file, or its error; a PassingError if it changed meanwhile, or because of a
        disk, a permission or memory.
    """
    try:
        with reading(path), unchanged(path):
            return Checked(source_sha256(path, alive=alive), _content(path, alive, detector))
    except PassingError as error:
        return error
    except MediaError as error:
        return PassingError(error.code, str(error)) if _may_pass(error) else error
    except Exception as error:  # noqa: BLE001  (memory ran out, which is all that passes `reading`)
        message = f"{path}: reading it fails with {type(error).__name__}: {error!s:.300}"
        return PassingError("unreadable", message)


def _may_pass(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, has a reason outside the file.

    Pillow and zipfile raise OSError for damage too, but without the number of a system call's.
    """
    if error is None:
        return False
    system = isinstance(error, OSError) and error.errno is not None
    return system or is_out_of_memory(error) or _may_pass(error.__context__)


def check_all(
    paths: Sequence[Path], *, workers: int, detector: Detector, stall_s: float
) -> Iterator[tuple[Path, Checked | MediaError]]:
    """Yield the outcome for every path as it becomes ready; see `map_in_processes`."""
    work: Callable[[Path, Heartbeat], Checked | MediaError] = partial(check, detector=detector)
    yield from map_in_processes(work, paths, workers=workers, stall_s=stall_s)


def _content(path: Path, alive: Heartbeat, detector: Detector) -> Content:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return npz.read_checked(path)
    if suffix in IMAGE_SUFFIXES:
        return image.read_checked(path)
    return probe.scan(path, detector=detector, alive=alive)
