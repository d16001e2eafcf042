"""The run of a job's training stage: whether it is complete, and how it is continued.

Owns: the comparison of the job's settings with those that the run recorded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanlora.config.describe import as_toml
from wanlora.config.run_settings import from_recorded, recorded_settings
from wanlora.core.fingerprint import flatten
from wanlora.core.location import Location
from wanlora.errors import ConfigError
from wanlora.runs import run_folder, same_settings
from wanlora.store.views import read_view


def changed_settings(run_dir: Path, settings: Mapping[str, Any]) -> list[str]:
    """Write as options the settings that differ from those of the run that is continued.

    `train --resume` takes the run's own value of a setting that it is not given, and the command
    of a stage leaves out settings at their defaults.

    Args:
        run_dir: Folder of the run.
        settings: Settings of the job file, as a run records them.

    Raises:
        ConfigError: The run has a value of a setting for which the file has none, and no option
            removes a value.
    """
    own = from_recorded(run_dir, run_folder.read_settings(run_dir))
    recorded, wanted = flatten(recorded_settings(own)), flatten(settings)
    set_by_run = {name for name, value in recorded.items() if value is not None}
    lost = [name for name in sorted(set_by_run - _MAY_BE_LEFT_OUT) if wanted.get(name) is None]
    if lost:
        raise ConfigError(
            f"[train] does not set {lost[0]}, and the run in {run_dir} has {lost[0]} = "
            f"{as_toml(recorded[lost[0]])}: set it to this value, or choose another output_dir"
        )
    changed = {
        name: value
        for name, value in wanted.items()
        if value is not None and name not in ("output_dir", "resume")
        and recorded.get(name) != value
    }  # fmt: skip
    if wanted["max_steps"] is None and recorded["max_steps"] is not None:  # else its steps count
        changed["num_epochs"] = wanted["num_epochs"]
    return [word for name in changed for word in ("--set", f"{name}={as_toml(changed[name])}")]


_MAY_BE_LEFT_OUT = frozenset({"max_steps", "optimizer.warmup_steps"})
"""Settings of a run that its file may lack: num_epochs is given instead, and the run keeps its own
warm-up."""


def finished_steps(
    run_dir: Path, settings: Mapping[str, Any], *, cache: Location, view: str, patience: int
) -> int | None:
    """Return the steps of a run that is complete with these settings and clips; None otherwise.

    A run that ended by `validation.patience` is complete: `--resume` would train it further.
    Otherwise `train --resume` continues the run, or refuses it by the setting that differs.

    Args:
        run_dir: Folder of the run.
        settings: Settings of the job file, as a run records them.
        cache: The cache.
        view: Name of the view.
        patience: Value of `validation.patience`.
    """
    checkpoint, status = run_folder.newest_checkpoint(run_dir), run_folder.read_status(run_dir)
    ended_early = status.get("reason") == run_folder.out_of_patience(patience)
    if checkpoint is None or not (status.get("state") == "done" or ended_early):
        return None
    recorded, facts = run_folder.read_config(run_dir)
    same_clips = facts.get("view_sha256") == read_view(cache, view).sha256
    same = same_clips and same_settings.same_settings(recorded, settings)
    return run_folder.step_of(checkpoint) if same else None
