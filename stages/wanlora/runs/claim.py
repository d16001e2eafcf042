"""Start or continue a run in a folder: refuse one that is taken, record settings, lock it.

Owns: which folder may be used, the choice of the checkpoint to continue from, and the lock. Must
not know: the content of a checkpoint.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout

from wanlora.core import units
from wanlora.errors import RunError, WanloraError
from wanlora.files import foreign_files, require_folder, write_text
from wanlora.runs.run_folder import (
    ADAPTER_NAME,
    BEST_NAME,
    CARD_NAME,
    CONFIG_NAME,
    EMA_NAME,
    LOCK_NAME,
    METRICS_NAME,
    PAGE_NAME,
    STATUS_NAME,
    is_run,
    newest_checkpoint,
    read_settings,
    resume_command,
)
from wanlora.runs.same_settings import differing_settings, without_none

LOCK_WAIT_S = 0.5
"""Seconds to wait for the lock: `wanlora watch` takes it for some microseconds."""

logger = logging.getLogger(__name__)


def open_run(
    run_dir: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    resolve: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Path | None:
    """Check a run's folder, and return the checkpoint to continue from, if any. Writes nothing.

    Args:
        run_dir: The run's folder.
        settings: Settings of this command.
        resume: True to continue the run in the folder, if there is one.
        resolve: Fills in the defaults of settings, so that recorded and current settings are
            compared by value. A setting that is newer than the run has its default there.

    Raises:
        RunError: The folder has a run and `resume` is false; the run has other settings; or there
            is no checkpoint, and a run would replace an adapter or other files.
        OutputError: The folder cannot be written.
    """
    require_folder(run_dir, flag="--output-dir")
    checkpoint = newest_checkpoint(run_dir)
    config_path = run_dir / CONFIG_NAME
    recorded = read_settings(run_dir) if is_run(run_dir) and config_path.exists() else None
    differing = (
        differing_settings(resolve(recorded), resolve(dict(settings)))
        if recorded is not None
        else []
    )
    if not checkpoint:
        _require_nothing_finished(run_dir, same_settings=not differing)
        return None
    if not resume:
        raise RunError(
            f"{run_dir} already holds a run (newest checkpoint: {checkpoint.name}): continue it "
            f"with {resume_command(run_dir)}, or choose another --output-dir"
        )
    if differing:
        raise RunError(
            f"{run_dir} is a run of other settings, so it cannot be continued:\n  "
            + "\n  ".join(differing)
            + f"\nleave these settings out ({resume_command(run_dir)} takes the run's own), or "
            "start again in another --output-dir"
        )
    return checkpoint


def _require_nothing_finished(run_dir: Path, *, same_settings: bool) -> None:
    """Refuse a folder without a checkpoint if a new run there would replace files.

    Args:
        run_dir: The folder.
        same_settings: True if the folder's run has the same settings.

    Raises:
        RunError: The folder has an adapter, a finished run or other files.
    """
    attempt = is_run(run_dir)
    names = (ADAPTER_NAME, f"{EMA_NAME}/{ADAPTER_NAME}", f"{BEST_NAME}/{ADAPTER_NAME}")
    kept = [run_dir / name for name in names if (run_dir / name).exists()]
    # A run killed before its first checkpoint may have left a best adapter, and makes it again.
    made_again = attempt and same_settings and kept == [run_dir / names[-1]]
    if kept and (not made_again or (run_dir / CARD_NAME).exists()):
        raise RunError(
            f"{run_dir} holds an adapter and no checkpoint to continue from: a run here would "
            f"replace {kept[0]}. Start from its weights in a new folder: --init-adapter "
            f"{kept[0].parent} --output-dir {run_dir}-2"
        )
    others = [CARD_NAME] if attempt and (run_dir / CARD_NAME).exists() else []
    others += [] if attempt else foreign_files(run_dir)
    if others:
        raise RunError(
            f"{run_dir} holds {units.names(others)}, and no run that can be continued: "
            "a run here could replace files. Choose a new or empty folder with --output-dir"
        )


@contextmanager
def begin_run(
    run_dir: Path,
    settings: Mapping[str, Any],
    facts: Mapping[str, str],
    *,
    checkpoint: Path | None,
) -> Iterator[None]:
    """Make a run's folder, record its settings, and lock it inside the block.

    A run that fails before its first step leaves the folder as it was.

    Args:
        run_dir: The run's folder.
        settings: Content of config.toml.
        facts: Origin of the run: comments at the head of config.toml, so that the file can be given
            to --config again.
        checkpoint: From `open_run`; another process may have trained since then.

    Raises:
        RunError: Another process trains in this folder, or has done so since it was checked.
    """
    before = set(run_dir.iterdir()) if run_dir.exists() else None
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK_NAME)
    try:
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise RunError(
            f"another process is training in {run_dir}: wait for it to end, or choose another "
            "--output-dir"
        ) from None
    except NotImplementedError:
        logger.warning("%s cannot be locked: make sure that no other process uses it", run_dir)
    try:
        if newest_checkpoint(run_dir) != checkpoint:
            raise RunError(
                f"another process has trained in {run_dir} since this one started: continue its "
                f"run with {resume_command(run_dir)}, or choose another --output-dir"
            )
        _record_settings(run_dir, without_none(settings), facts, resumed=checkpoint is not None)
        yield
    except WanloraError:
        if not (run_dir / METRICS_NAME).exists() and newest_checkpoint(run_dir) is None:
            _leave_as_before(run_dir, before)
        raise
    finally:
        lock.release()


def _record_settings(
    run_dir: Path, settings: Mapping[str, Any], facts: Mapping[str, str], *, resumed: bool
) -> None:
    """Write config.toml; keep one with the same settings: a person may have added comments."""
    path = run_dir / CONFIG_NAME
    if resumed and path.exists() and read_settings(run_dir) == settings:
        return
    head = "".join(f"# {name}: {value}\n" for name, value in facts.items())
    write_text(path, head + tomli_w.dumps(settings))


def _leave_as_before(run_dir: Path, before: set[Path] | None) -> None:
    """Remove the files of a failed start, and the folder if it is new."""
    if before is None:
        shutil.rmtree(run_dir, ignore_errors=True)
        return
    for name in (CONFIG_NAME, LOCK_NAME, STATUS_NAME, PAGE_NAME):
        if run_dir / name not in before:
            (run_dir / name).unlink(missing_ok=True)
