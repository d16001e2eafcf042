"""A run's folder in outputs/: its files, and how it stays whole.

    config.toml                          the resolved settings, and what was trained on
    metrics.jsonl                        one object a step
    pytorch_lora_weights.safetensors     the newest adapter, where diffusers looks for it
    checkpoints/step-000500/             what resume needs
    best/  ema/                          the adapter of the best validation; the moving average
    previews/step-000500/                latents and pictures made while training
    validation.jsonl                     one object a validation
    validation_base.json                 the base model's losses on the validation panels
    status.json  run.html                the state of the run; its page

Owns: names, atomic publication, and the choice of what to resume. Must not know what is inside a
checkpoint. Killed at any instruction, every file and checkpoint is whole or not there.
"""

import json
import logging
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout

from wanlora.core import units
from wanlora.core.fingerprint import difference
from wanlora.errors import RunError, WanloraError
from wanlora.files import foreign_files, fsync_dir, fsync_tree, require_folder, write_text, writing

ADAPTER_NAME = "pytorch_lora_weights.safetensors"
CONFIG_NAME = "config.toml"
METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"
BASE_LOSSES_NAME = "validation_base.json"
BEST_NAME = "best"
EMA_NAME = "ema"
CHECKPOINTS_NAME = "checkpoints"
PREVIEWS_NAME = "previews"
CARD_NAME = "README.md"
STATUS_NAME = "status.json"
PAGE_NAME = "run.html"
LOCK_NAME = ".lock"

LOCK_WAIT_S = 0.5
"""`wanlora watch` holds a shared lock for some microseconds when it looks for a process."""

logger = logging.getLogger(__name__)

# Settings that may change when a run continues: they decide how far or how it runs, not what it is.
# The weights of the model and the content of the cache are compared with the checkpoint's.
FREE_ON_RESUME = frozenset(
    {
        "max_steps", "num_epochs", "save_steps", "save_minutes", "keep_checkpoints", "resume",
        "device", "activations", "eager", "attention", "prefetch_batches", "output_dir", "cache",
        "allow_untrained_base", "local_copy", "save_every_epoch", "trackers", "previews",
        "validation", "deterministic", "process_timeout_s", "model",
    }
)  # fmt: skip


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
        settings: The settings now.
        resume: Whether to continue a run that the folder holds.
        resolve: Fills in the defaults of settings, so that the recorded ones and those of now are
            compared by value. A setting that is newer than the run has its default there.

    Raises:
        RunError: The folder holds a run and `resume` is false; the run has other settings; or there
            is no checkpoint, and a run would replace an adapter or files of something else.
        OutputError: The folder cannot be written.
    """
    require_folder(run_dir, flag="--output-dir")
    checkpoint = newest_checkpoint(run_dir)
    config_path = run_dir / CONFIG_NAME
    recorded = read_settings(run_dir) if is_run(run_dir) and config_path.exists() else None
    differing = (
        difference(_identity(resolve(recorded)), _identity(resolve(dict(settings))))
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


def resume_command(run_dir: Path) -> str:
    """Command that continues a run with its own settings."""
    return shlex.join(["wanlora", "train", "--output-dir", str(run_dir), "--resume"])


def is_run(run_dir: Path) -> bool:
    """Return whether a folder holds a run, also one that ended before its first checkpoint.

    Without a checkpoint, config.toml must have the head that `begin_run` writes, and stand beside
    another file of the run: a person may have put a copy of it there.
    """
    if newest_checkpoint(run_dir):
        return True
    config_path = run_dir / CONFIG_NAME
    if not config_path.is_file() or not any(
        (run_dir / name).exists() for name in (LOCK_NAME, METRICS_NAME)
    ):
        return False
    return re.search(rb"^# wanlora: ", config_path.read_bytes(), re.MULTILINE) is not None


def _require_nothing_finished(run_dir: Path, *, same_settings: bool) -> None:
    """Refuse a folder without a checkpoint if a new run there would replace somebody's work.

    Args:
        run_dir: The folder.
        same_settings: Whether the run that the folder holds, if any, would be made again.

    Raises:
        RunError: The folder holds an adapter, a finished run or files of something else.
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
    """Make a run's folder, record its settings, and keep other processes out of it meanwhile.

    A run that is refused before its first step leaves nothing that was not there before it.

    Args:
        run_dir: The run's folder.
        settings: Content of config.toml.
        facts: Where the run comes from: comments at the head of config.toml, so that the file can
            be given to --config again.
        checkpoint: What `open_run` found; loading a model takes a while since.

    Raises:
        RunError: Another process trains in this folder, or did so since it was checked.
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
        logger.warning("%s cannot be locked: see to it that no other process uses it", run_dir)
    try:
        if newest_checkpoint(run_dir) != checkpoint:
            raise RunError(
                f"another process has trained in {run_dir} since this one started: continue its "
                f"run with {resume_command(run_dir)}, or choose another --output-dir"
            )
        _record_settings(run_dir, _without_none(settings), facts, resumed=checkpoint is not None)
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
    """Write config.toml, but leave one with the same settings: a person may have added comments."""
    path = run_dir / CONFIG_NAME
    if resumed and path.exists() and read_settings(run_dir) == settings:
        return
    head = "".join(f"# {name}: {value}\n" for name, value in facts.items())
    write_text(path, head + tomli_w.dumps(settings))


def _leave_as_before(run_dir: Path, before: set[Path] | None) -> None:
    """Remove what a refused start has made: the folder if it is new, else its files."""
    if before is None:
        shutil.rmtree(run_dir, ignore_errors=True)
        return
    for name in (CONFIG_NAME, LOCK_NAME, STATUS_NAME, PAGE_NAME):
        if run_dir / name not in before:
            (run_dir / name).unlink(missing_ok=True)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Checkpoint of the highest step, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """Steps done, from the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoints by step; a folder still being written has another name."""
    return _folders_of_steps(run_dir / CHECKPOINTS_NAME)


def preview_folders(run_dir: Path) -> list[Path]:
    """Folders of previews by step."""
    return _folders_of_steps(run_dir / PREVIEWS_NAME)


def _folders_of_steps(folder: Path) -> list[Path]:
    found = folder.glob("step-*")
    named = [path for path in found if re.fullmatch(r"step-[0-9]+", path.name)]  # not step-5.bad
    return sorted(named, key=step_of)


def adapter_of(path: Path, checkpoint: str) -> Path:
    """Find one of a run's adapters.

    Args:
        path: A run's folder; or an adapter by itself, which has only a latest.
        checkpoint: latest, best, ema, or a number of steps.

    Raises:
        RunError: The run has no such adapter; lists those it has.
    """
    if checkpoint == "latest":
        return path
    found = {
        name: path / name for name in (BEST_NAME, EMA_NAME) if (path / name / ADAPTER_NAME).exists()
    }
    found |= {str(step_of(each)): each for each in checkpoints(path)}
    wanted = str(int(checkpoint)) if checkpoint.isdecimal() else checkpoint
    if wanted not in found:
        raise RunError(
            f"{path} has no adapter {checkpoint}; it has: {', '.join(['latest', *found])}"
        )
    return found[wanted]


def publish_checkpoint(
    run_dir: Path, step: int, write: Callable[[Path], None], *, keep: int
) -> Path:
    """Write a checkpoint into a hidden folder, rename it into place, then drop the oldest.

    Args:
        run_dir: The run's folder.
        step: Steps done.
        write: Fills the folder it is given.
        keep: Newest checkpoints to keep; 0 = all.
    """
    parent = run_dir / CHECKPOINTS_NAME
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".*.partial"):
        shutil.rmtree(leftover)
    final = parent / f"step-{step:06d}"
    temporary = parent / f".{final.name}.partial"
    go_on = f"continue with: {resume_command(run_dir)}"
    then = f"{go_on}; there is no earlier checkpoint, so the run starts at step 0"
    if earlier := checkpoints(run_dir):
        then = f"{go_on}; the earlier checkpoint {earlier[-1].name} is complete"
    try:
        with writing(final, then=then):
            temporary.mkdir()
            write(temporary)
            fsync_tree(temporary)
            if final.exists():  # the same step again, after a resume
                _remove(final)
            temporary.rename(final)
            fsync_dir(parent)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if keep:
        for old in checkpoints(run_dir)[:-keep]:
            _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Hide a checkpoint, then remove it: what a kill leaves of it is taken for none."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def append_row(run_dir: Path, name: str, row: Mapping[str, Any]) -> None:
    """Add a line to metrics.jsonl or validation.jsonl; a resume cuts off one torn by a kill."""
    with (
        writing(run_dir / name, then=f"continue with: {resume_command(run_dir)}"),
        (run_dir / name).open("a") as file,
    ):
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read_rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl or validation.jsonl; none when there is no such file."""
    path = run_dir / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forget_after(run_dir: Path, num_steps: int, *, validated: bool = True) -> None:
    """Drop what a resumed run does again: metrics, validations and previews past its checkpoint.

    Args:
        run_dir: The run's folder.
        num_steps: Steps done at the checkpoint.
        validated: Whether the validation after those steps is kept, and not made again.
    """
    lasts = {METRICS_NAME: num_steps - 1, VALIDATION_NAME: num_steps - (not validated)}
    for name, last in lasts.items():
        if (run_dir / name).exists():
            kept = [row for row in read_rows(run_dir, name) if row["step"] <= last]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            write_text(run_dir / name, text)
    for folder in preview_folders(run_dir):
        if step_of(folder) > num_steps or num_steps == 0:
            shutil.rmtree(folder)


def forget_attempt(run_dir: Path) -> None:
    """Remove what a run left that ended before its first checkpoint, perhaps of another model.

    Metrics, validations and previews are `forget_after`'s.
    """
    (run_dir / BASE_LOSSES_NAME).unlink(missing_ok=True)
    for name in (BEST_NAME, EMA_NAME):
        (run_dir / name / ADAPTER_NAME).unlink(missing_ok=True)
        with suppress(OSError):  # there is no such folder, or it holds a user's files
            (run_dir / name).rmdir()


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Settings in a run's config.toml; empty without one.

    Raises:
        RunError: The file is not TOML.
    """
    path = run_dir / CONFIG_NAME
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path} is not TOML ({error}), so it cannot be told whether this run may be "
            "continued: restore it, or start again in another --output-dir"
        ) from None


def read_config(run_dir: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the settings of a run, and the facts at the head of its config.toml.

    Raises:
        RunError: The file is damaged.
    """
    path = run_dir / CONFIG_NAME
    if not path.exists():
        return {}, {}
    settings = read_settings(run_dir)
    head = [line[2:] for line in path.read_text("utf-8").splitlines() if line.startswith("# ")]
    return settings, dict(line.split(": ", 1) for line in head if ": " in line)


def read_status(run_dir: Path) -> dict[str, Any]:
    """Read status.json; empty if there is none or it is damaged."""
    try:
        return dict(json.loads((run_dir / STATUS_NAME).read_bytes()))
    except (OSError, ValueError):
        return {}


def out_of_patience(patience: int) -> str:
    """Reason of a run that ended because `patience` validations found no new best."""
    return f"no new best in {patience} validations"


def same_settings(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a run was trained with the wanted settings, apart from those of how it runs."""
    free = FREE_ON_RESUME - {"max_steps", "num_epochs", "model"}
    both = [
        {key: value for key, value in _without_none(each).items() if key not in free}
        for each in (recorded, wanted)
    ]
    if both[1]["optimizer"].get("warmup_steps") is None:  # recorded as the run used it
        both[0].get("optimizer", {}).pop("warmup_steps", None)
    return both[0] == both[1]


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in FREE_ON_RESUME}
    return dict(_without_none(kept))


def _without_none(value: Any) -> Any:
    """TOML has no null: a setting left to its default reading is left out."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return str(value) if isinstance(value, Path) else value
