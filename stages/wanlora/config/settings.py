"""What every command's settings share: flags, common fields, and how settings are read.

Owns: precedence (default < TOML < --set < flag) and the words of a refusal. Must not know: torch.
"""

import difflib
import json
import re
import shlex
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from wanlora.core import location
from wanlora.core.location import Url
from wanlora.core.text import decode_utf8
from wanlora.errors import ConfigError

DEFAULT_MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


class Flag:
    """Marks a field that a person types every day: the command line gives it these names.

    Args:
        names: Option names; empty for the field's own name with hyphens. A name after the first
            is an alias.
        argument: Whether it is positional.
        bare: Value that the option stands for when none follows it.
    """

    def __init__(self, *names: str, argument: bool = False, bare: str = "") -> None:
        self.names = names
        self.argument = argument
        self.bare = bare


class Settings(BaseModel):
    """Frozen, and closed: an unknown key is an error, not a surprise."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_paths(cls, value: Any, info: ValidationInfo) -> Any:
        """Read every path of every command in one way; a location reads its URLs itself."""
        kinds = _kinds(cls.model_fields[info.field_name].annotation) if info.field_name else set()
        if Path not in kinds or Url in kinds:
            return value
        if isinstance(value, list | tuple):
            return [location.parse_path(v) if isinstance(v, str | Path) else v for v in value]
        return location.parse_path(value) if isinstance(value, str | Path) else value


Device = Annotated[
    str,
    Field(
        description="Where to compute: auto, cpu, cuda, cuda:1, mps. auto takes CUDA; it "
        "never takes mps, nor a CPU for a model other than micro.",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    ),
    Flag(),
]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="Seed of every random draw."), Flag()]
CacheLocation = Annotated[
    Path | Url,
    BeforeValidator(location.parse),
    PlainSerializer(str, return_type=str),
]
CacheDir = Annotated[
    CacheLocation,
    Field(
        description="Cache folder, holding store.zarr and views/; or a URL such as "
        "s3://bucket/prefix (docs/cache.md)."
    ),
    Flag("--cache"),
]
ViewName = Annotated[
    str,
    Field(
        description="Name of the view in CACHE/views: letters, digits and . _ -",
        pattern=r"^[A-Za-z0-9][\w.-]*$",
    ),
    Flag(),
]


TokenizerOf = Annotated[
    str,
    Field(
        description="Model whose tokenizer counts captions, if it is on this machine; else an "
        "estimate, marked as such."
    ),
    Flag(),
]


S = TypeVar("S", bound=Settings)


def _kinds(annotation: Any) -> set[Any]:
    """List the types inside an annotation."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def load(
    model: type[S],
    *,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> S:
    """Build a command's settings: default < TOML file < `--set a.b=value` < flag.

    Raises:
        ConfigError: A key is unknown or a value is out of range; names the field and where it came
            from.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = _read_toml(file.expanduser())
    for item in sets:
        _assign(model, values, item)
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, dict(problem)) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def command_line(command: str, config: Settings, *, without: Collection[str] = ()) -> str:
    """Write the command that gives these settings, from any working directory.

    Args:
        command: Its name.
        config: Settings; those at their defaults are left out.
        without: Fields to leave out.
    """
    words = ["wanlora", command]
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name in without or value == field.default:
            continue
        flag = next((item for item in field.metadata if isinstance(item, Flag)), None)
        values = [str(v.absolute() if isinstance(v, Path) else v) for v in
                  (value if isinstance(value, tuple) else [value])]  # fmt: skip
        if flag is None:
            shown = json.dumps(value) if isinstance(value, tuple | bool) else values[0]
            words += ["--set", f"{name}={shown}"]
            continue
        option = next(iter(flag.names), f"--{name.replace('_', '-')}")
        for text in values:
            words += [text] if flag.argument else [option] if value is True else [option, text]
    return shlex.join(words)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(decode_utf8(file.read_bytes()))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {file}") from None
    except OSError as error:
        raise ConfigError(f"configuration file {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # other text, not TOML, nested too deeply
        raise ConfigError(f"{file} is not TOML: {error}") from None


def _assign(model: type[Settings], values: dict[str, Any], item: str) -> None:
    """Apply one `a.b=value`; the value is TOML, or plain text when it is not."""
    name, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"--set {item}: expected NAME=VALUE, for example --set lora.rank=16")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    *parents, leaf = _parts(model, name.strip())
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {item}: {parent} is a value, not a group of settings")
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
        return f"--{path.replace('_', '-')} is required: {_description(model, path)}"
    if kind == "string_pattern_mismatch":
        return f"{path}: found {found!r}, which does not fit. {_description(model, path)}"
    if kind in ("model_type", "model_attributes_type"):
        inside = ", ".join(name for name in _names(model) if name.startswith(f"{path}."))
        return f"{path} is a group of settings, not a value (found {found!r}); set one of: {inside}"
    if kind == "tuple_type":
        return f"{path}: expected a list, as in --set '{path}=[\"...\"]' (found {found!r})"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message} (found {found!r})" if path else message


def _unknown(model: type[Settings], path: str) -> str:
    """Name the settings there are, the likeliest first."""
    known = sorted(_names(model))
    leaf = path.rpartition(".")[2]
    likely = [name for name in known if name.rpartition(".")[2] == leaf]
    groups = {name.partition(".")[0] for name in known}
    likely += difflib.get_close_matches(path, sorted({*known, *groups}), n=1)
    command = re.sub(r"(?<!^)(?=[A-Z])", "-", model.__name__.removesuffix("Config")).lower()
    guess = f" (did you mean {likely[0]}?)" if likely else ""
    return f"unknown setting {path}{guess}; wanlora {command} has: {', '.join(known)}"


def _description(model: type[Settings], path: str) -> str:
    """What a setting is for, by its dotted name; empty for one inside a list."""
    kind: Any = model
    field = None
    for part in path.split("."):
        field = getattr(kind, "model_fields", {}).get(part)
        kind = field.annotation if field else None
    return str(field.description) if field else ""


def _names(model: type[Settings], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            names += _names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
