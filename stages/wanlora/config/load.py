"""Read and check settings, and write settings as a command line.

Owns: precedence (default < TOML < --set < flag) and the messages of rejected settings.
Must not know: torch.
"""

import difflib
import functools
import re
import shlex
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from wanlora.config.describe import as_toml
from wanlora.config.nearest import nearest
from wanlora.config.settings import Settings, settings_of
from wanlora.core.text import decode_utf8
from wanlora.errors import ConfigError

S = TypeVar("S", bound=Settings)

REMOVED = {
    ("optimizer.name", "adamw8bit"): "adamw8bit was removed: use adamw, which needs at most 262 MB "
    "more memory",
}
"""Values that earlier releases accepted, by the name of the setting, and what to use instead."""


def load(
    model: type[S],
    *,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> S:
    """Build a command's settings: default < TOML file < `--set a.b=value` < flag.

    Args:
        model: The command's settings.
        file: TOML file.
        sets: Values of `--set`, NAME=VALUE.
        flags: Values of flags by dotted name.

    Raises:
        ConfigError: A key is unknown or a value is out of range; names the field and its source.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = read_toml(file.expanduser())
    for item in sets:
        assign(model, values, item)
    for name, value in (flags or {}).items():
        if value is not None:
            _set(values, name.split("."), value, origin=f"--{name.rpartition('.')[2]}")
    return build(model, values)


def build(model: type[S], values: Mapping[str, Any]) -> S:
    """Build settings from a table of values.

    Raises:
        ConfigError: A key is unknown or a value is out of range; names the field.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, dict(problem)) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def command_line(
    command: str, config: Settings, *, without: Collection[str] = (), absolute: bool = True
) -> str:
    """Write the command that gives these settings.

    Args:
        command: Its name.
        config: Settings; those at their defaults are left out.
        without: Settings to leave out, by dotted name.
        absolute: Write absolute paths, for a command that runs in any working directory.
    """
    words = ["wanlora", command]
    for setting in settings_of(type(config)):
        value: Any = functools.reduce(getattr, setting.name.split("."), config)
        if setting.name in without or value == setting.field.default:
            continue
        one_text = isinstance(value, tuple) and len(value) == 1 and _may_be_text(setting.field)
        if setting.flag is None or value == () or one_text:  # a flag given once is not a list
            words += _as_sets(setting.name, value)
            continue
        for item in value if isinstance(value, tuple) else [value]:
            text = _as_argument(item.absolute() if absolute and isinstance(item, Path) else item)
            if not setting.flag.argument:
                words.append(setting.options[0])
            if item is not True:
                words.append(text)
    return shlex.join(words)


def _as_argument(value: Any) -> str:
    """Write the value of a flag."""
    return as_toml(value) if isinstance(value, float) else str(value)


def _may_be_text(field: FieldInfo) -> bool:
    """Return whether a setting is a text or a list: a regex or several names."""
    return get_origin(field.annotation) is not tuple and str in get_args(field.annotation)


def _as_sets(name: str, value: Any) -> list[str]:
    """Write a setting as arguments of `--set`."""
    if isinstance(value, dict):
        return [word for key, item in value.items() for word in _as_sets(f"{name}.{key}", item)]
    text = str(value)
    if isinstance(value, tuple | bool) or _reads_as_toml(text):
        text = as_toml(value)
    return ["--set", f"{name}={text}"]


def _reads_as_toml(text: str) -> bool:
    try:
        return bool(tomllib.loads(f"value = {text}"))
    except (tomllib.TOMLDecodeError, RecursionError):
        return False


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: The file does not exist or cannot be read.
    """
    try:
        return tomllib.loads(decode_utf8(file.read_bytes()))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {file}") from None
    except OSError as error:
        raise ConfigError(f"configuration file {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # other text, not TOML, nested too deeply
        raise ConfigError(f"{file} is not TOML: {error}") from None


def assign(model: type[Settings], values: dict[str, Any], item: str) -> None:
    """Apply one `a.b=value` to a table; the value is TOML, or plain text when it is not.

    Raises:
        ConfigError: The item has no value, or a parent is not a group.
    """
    name, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"--set {item}: expected NAME=VALUE, for example --set lora.rank=16")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    _set(values, _parts(model, name.strip()), value, origin=f"--set {item}")


def _set(values: dict[str, Any], path: Sequence[str], value: Any, *, origin: str) -> None:
    """Set a value in nested tables."""
    *parents, leaf = path
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{origin}: {parent} is a value, not a group of settings")
    values[leaf] = value


def _parts(model: type[Settings], name: str) -> list[str]:
    """Parts of a dotted name. In a table with free keys the rest is one key, kept as it is."""
    group, _, key = name.partition(".")
    field = model.model_fields.get(group.replace("-", "_"))
    if key and field and get_origin(field.annotation) is dict:
        return [group.replace("-", "_"), key]
    return name.replace("-", "_").split(".")


def _explain(model: type[Settings], problem: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return _unknown(model, path)
    if kind == "missing":
        setting = next(each for each in settings_of(model) if each.name == path)
        positional = setting.flag and setting.flag.argument
        name = setting.options[0].upper() if positional else (*setting.options, path)[0]
        return f"{name} is required: {setting.field.description}"
    if kind == "string_pattern_mismatch":
        return f"{path}: found {found!r}, which is not valid. {_description(model, path)}"
    if kind in ("model_type", "model_attributes_type"):
        inside = ", ".join(name for name, *_ in settings_of(model) if name.startswith(f"{path}."))
        return f"{path} is a group of settings, not a value (found {found!r}); set one of: {inside}"
    if kind == "tuple_type":
        return f"{path}: expected a list, as in --set '{path}=[\"...\"]' (found {found!r})"
    if isinstance(found, str) and (path, found) in REMOVED:
        return f"{path}: {REMOVED[path, found]}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message} (found {found!r})" if path else message


def _unknown(model: type[Settings], path: str) -> str:
    """Name the nearest settings, and the command that lists all."""
    command = re.sub(r"(?<!^)(?=[A-Z])", "-", model.__name__.removesuffix("Config")).lower()
    groups = {setting.name.partition(".")[0] for setting in settings_of(model)}
    likely = difflib.get_close_matches(path, groups, n=1, cutoff=0.85)
    likely += [setting.name for setting in nearest(model, path)]
    guess = f" (did you mean {likely[0]}?)" if likely else ""
    return f"unknown setting {path}{guess}; all settings: wanlora config {command}"


def _description(model: type[Settings], path: str) -> str:
    """Return the description of a setting, by its dotted name; empty for one inside a list."""
    kind: Any = model
    field = None
    for part in path.split("."):
        field = getattr(kind, "model_fields", {}).get(part)
        kind = field.annotation if field else None
    return str(field.description) if field else ""
