"""Settings of a training run as its config.toml records them, and completed with `--resume`.

Owns: the precedence of given over recorded settings, and the paths of a run that was moved or is
continued from another working directory. `runs.same_settings` decides which settings may change.
Must not know: models, the store.
"""

import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from wanlora import __version__
from wanlora.config import Settings, TrainConfig
from wanlora.config.load import build
from wanlora.core.fingerprint import difference
from wanlora.errors import ConfigError, RunError
from wanlora.runs import run_folder

PATHS = ("cache", "manifest", "init_adapter", "local_copy", "model")
"""Settings that name files or folders; `model` may also be micro or an id on the hub."""

SHOWN_RUNS = 3
"""Runs of the same parent folder that a refusal lists."""

logger = logging.getLogger(__name__)


def with_recorded(config: TrainConfig) -> TrainConfig:
    """Add the recorded settings of a run to those given with `--resume`.

    A given setting has precedence; `runs.claim.open_run` refuses those that may not change.

    Returns:
        The settings of the run; `config` itself without `resume`, or if the folder has no run.

    Raises:
        RunError: Only the folder was given, and it has no run; its settings cannot be read; or
            its cache is missing.
        ConfigError: The given settings contradict the recorded ones.
    """
    if not config.resume:
        return config
    run_dir = config.output_dir
    if not (run_folder.is_run(run_dir) and (run_dir / run_folder.CONFIG_NAME).exists()):
        if config.model_fields_set <= {"output_dir", "resume"}:
            raise RunError(_no_run(run_dir))
        return config
    raw = run_folder.read_settings(run_dir)
    recorded = from_recorded(run_dir, raw).model_dump(exclude_unset=True)
    given = config.model_dump(exclude_unset=True)
    for name in PATHS:  # also given by --config RUN/config.toml, before the run was moved
        if name in given and name in raw and _plain(given[name]) == _plain(raw[name]):
            del given[name]
    if "num_epochs" in given and "max_steps" not in given:  # max_steps would win
        recorded.pop("max_steps", None)
    try:
        result = TrainConfig.model_validate(
            _merged(recorded, given, TrainConfig) | {"output_dir": run_dir, "resume": True}
        )
    except ValidationError as error:
        problems = [problem["msg"].removeprefix("Value error, ") for problem in error.errors()]
        path = run_dir / run_folder.CONFIG_NAME
        raise ConfigError("\n".join([*problems, f"the other settings are of {path}"])) from None
    if "cache" not in given and isinstance(result.cache, Path) and not result.cache.exists():
        raise RunError(
            f"the cache of {run_dir} is not at {result.cache} any more: give its new place with "
            f"--cache: {run_folder.resume_command(run_dir)} --cache CACHE"
        )
    _log_changes(run_dir, from_recorded(run_dir, raw), result)
    return result


def recorded_settings(config: TrainConfig) -> dict[str, Any]:
    """Content of config.toml: the settings as JSON values, with absolute paths.

    `resume` has its default, so the file can be given to `--config` for another run.
    """
    settings = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Path):
            settings[name] = str(value.absolute())
        elif isinstance(value, tuple) and value and isinstance(value[0], Path):
            settings[name] = [str(path.absolute()) for path in value]
        if name == "resume":
            settings[name] = field.default
    model = Path(config.model or "").expanduser()
    if config.model and model.is_dir() and config.model != "micro":
        settings["model"] = str(model.absolute())
    return settings


def from_recorded(run_dir: Path, recorded: Mapping[str, Any]) -> TrainConfig:
    """Read recorded settings, with the current paths of their files.

    Args:
        run_dir: The run's folder.
        recorded: Content of its config.toml.

    Raises:
        RunError: This release does not have a setting.
    """
    found = dict(recorded)
    output_dir = Path(str(recorded.get("output_dir", run_dir)))
    for name in set(PATHS) & found.keys():
        value = found[name]
        if value is None:
            continue
        if isinstance(value, list | tuple):
            found[name] = [_moved(str(path), output_dir, run_dir) for path in value]
        else:
            found[name] = _moved(str(value), output_dir, run_dir)
    try:
        return build(TrainConfig, found)
    except ConfigError as error:
        raise RunError(
            f"{run_dir / run_folder.CONFIG_NAME} has settings that this release ({__version__}) "
            f"does not accept:\n{error}\nContinue the run with the release that made it, or start "
            f"a new run from its adapter: --output-dir NEW --init-adapter "
            f"{shlex.quote(str(run_dir))}"
        ) from None


def _moved(text: str, old_run_dir: Path, run_dir: Path) -> str:
    """Current path of a recorded file: the recorded one, else the same path relative to the run."""
    if "://" in text:
        return text
    places = list(_places(Path(text), old_run_dir, run_dir.absolute()))
    return next((str(place) for place in places if place.exists()), text)


def _places(path: Path, old_run_dir: Path, run_dir: Path) -> Iterator[Path]:
    """Candidates for a path, the most probable first.

    Earlier releases recorded relative paths. Their working directory is the part of the run's
    folder before the recorded `output_dir`.
    """
    if path.is_absolute():
        yield path
        if old_run_dir.is_absolute():
            yield Path(os.path.normpath(run_dir / os.path.relpath(path, old_run_dir)))
        return
    depth = len(old_run_dir.parts)
    if not old_run_dir.is_absolute() and run_dir.parts[-depth:] == old_run_dir.parts:
        yield Path(*run_dir.parts[:-depth]) / path
    yield path


def _merged(
    recorded: Mapping[str, Any], given: Mapping[str, Any], model: type[Settings]
) -> dict[str, Any]:
    """Put given settings over recorded ones, inside groups too."""
    result = dict(recorded)
    for name, value in given.items():
        kind = model.model_fields[name].annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            result[name] = _merged(recorded.get(name, {}), value, kind)
        else:
            result[name] = value
    return result


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _log_changes(run_dir: Path, before: TrainConfig, after: TrainConfig) -> None:
    """Log the settings that differ from the recorded ones."""
    ignored = {"output_dir", "resume"}
    changed = difference(
        before.model_dump(mode="json", exclude=ignored),
        after.model_dump(mode="json", exclude=ignored),
    )
    logger.info(
        "settings of %s%s",
        run_dir / run_folder.CONFIG_NAME,
        "".join(f"\n  changed: {line}" for line in changed),
    )


def _no_run(run_dir: Path) -> str:
    parent = run_dir.absolute().parent
    found = sorted(path.parent for path in parent.glob(f"*/{run_folder.CONFIG_NAME}"))
    others = [str(run_dir.parent / path.name) for path in found if run_folder.is_run(path)]
    listed = f" (runs in {parent}: {', '.join(others[:SHOWN_RUNS])})" if others else ""
    return (
        f"{run_dir} holds no run to continue{listed}; to start one: "
        f"wanlora train --cache CACHE --output-dir {run_dir}"
    )
