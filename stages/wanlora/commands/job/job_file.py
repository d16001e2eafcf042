"""The file of a job: its tables, and the settings of each stage.

Owns: the order of stages, and the settings that a stage takes from the stages before it.
Must not know: runs, processes.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wanlora.commands.show_config import JOB
from wanlora.config import ACTIVITY, COMMANDS, Settings
from wanlora.config.load import assign, build, read_toml
from wanlora.config.template import DECIDED
from wanlora.errors import ConfigError


def read_job(path: Path, sets: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Read the tables of a job file, in the order of the stages, and apply `--set`.

    Args:
        path: The file.
        sets: Values of `--set`: STAGE.NAME=VALUE.

    Raises:
        ConfigError: The file cannot be read, or has something other than the tables of stages.
    """
    tables = _tables_of(path)
    for item in sets:
        stage, _, assignment = item.partition(".")
        name = stage.replace("_", "-")
        if name not in tables or not assignment:
            raise ConfigError(
                f"--set {item}: expected STAGE.NAME=VALUE with a table of {path}: "
                + ", ".join(tables)
            )
        assign(COMMANDS[name], tables[name], assignment)
    return {name: tables[name] for name in JOB if name in tables}


def _tables_of(path: Path) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for key, table in read_toml(path.expanduser()).items():
        name = key.replace("_", "-")
        if not isinstance(table, dict):
            raise ConfigError(
                f"{path}: {key} is outside of a table; put it under one of {_headers()}"
            )
        if name not in JOB:
            raise ConfigError(f"{path}: unknown table [{key}]{_nearest(name)}")
        if name in tables:
            raise ConfigError(f"{path} has the table [{name}] twice: keep one of them")
        tables[name] = table
    if not tables:
        raise ConfigError(f"{path} has none of the tables {_headers()}")
    return tables


def _headers() -> str:
    return " ".join(f"[{name}]" for name in JOB)


def _nearest(name: str) -> str:
    likely = difflib.get_close_matches(name, JOB, n=1)
    guess = f"; did you mean [{likely[0]}]?" if likely else "."
    return f"{guess} A job has the tables {_headers()}"


def build_stages(tables: Mapping[str, dict[str, Any]]) -> dict[str, Settings]:
    """Build the settings of each stage. A stage reads what the stages before it write.

    Raises:
        ConfigError: A setting is unknown or out of range, or a stage reads something else.
    """
    stages: dict[str, Settings] = {}
    for name, table in tables.items():
        if decided := sorted(DECIDED.keys() & table.keys()):
            raise ConfigError(f"[{name}] {decided[0]}: leave it out; {DECIDED[decided[0]]}")
        try:
            stages[name] = build(COMMANDS[name], _inherited(name, table, stages) | table)
        except ConfigError as error:
            raise ConfigError(f"[{name}] {error}") from None
    _require_same_paths(stages)
    return stages


def _inherited(
    name: str, table: Mapping[str, Any], stages: Mapping[str, Settings]
) -> dict[str, Any]:
    """Return the settings that a stage takes from the stages before it."""
    cached = stages.get("train") or stages.get("cache-latents")
    values: dict[str, Any] = {}
    if name == "cache-latents" and (prepared := stages.get("prepare")):
        values["manifest"] = [_get(prepared, "output")]
    has_prompts = any(table.get(key) for key in ("prompt", "prompts", "latents"))
    if name == "sample" and has_prompts and ACTIVITY not in str(table.get("prompt")):
        cached = None  # a cache is for the prompts of its activities
    if name != "cache-latents" and cached:
        values |= {key: _get(cached, key) for key in ("cache", "view")}
    if trained := stages.get("train"):
        run_dir = _get(trained, "output_dir")
        if "latents" not in table:
            values["adapter"] = [run_dir]
        if name == "sample" and not table.keys() & {"output", "output_dir"}:
            values["output_dir"] = f"{run_dir}/samples"
        if name == "evaluate":
            values["output_dir"] = f"{run_dir}/evaluation"
    if name == "sample" and not table.keys() & {"overwrite", "latents"}:
        values["skip_existing"] = True
    return values


def _get(settings: Settings, name: str) -> str:
    return str(getattr(settings, name))


def _require_same_paths(stages: Mapping[str, Settings]) -> None:
    """Refuse a stage that does not read what the stages before it write.

    Raises:
        ConfigError: Names both settings.
    """
    for writer, output, reader, source in _SAME_PATHS:
        if writer not in stages or reader not in stages:
            continue
        written, read = _get(stages[writer], output), getattr(stages[reader], source)
        paths = [str(path) for path in (read if isinstance(read, tuple) else [read])]
        expected = (written, f"{written}/train.jsonl")
        if read is not None and not any(path in expected for path in paths):
            raise ConfigError(
                f"[{writer}] writes {output} = {written}, but [{reader}] reads {source} = "
                f"{', '.join(paths)}: leave out one of the two settings, or one of the stages"
            )


_SAME_PATHS = (
    ("prepare", "output", "cache-latents", "manifest"),
    ("cache-latents", "cache", "train", "cache"),
    ("cache-latents", "view", "train", "view"),
    ("train", "cache", "sample", "cache"),
    ("train", "cache", "evaluate", "cache"),
)
"""A stage and its setting, and the stage and the setting that have to name the same path."""
