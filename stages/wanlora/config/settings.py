"""What every command's settings share: flags, common fields, and how settings are read.

Owns: precedence (default < TOML < --set < flag) and the words of a refusal. Must not know: torch.
"""

import difflib
import functools
import json
import re
import shlex
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

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
from pydantic.fields import FieldInfo

from wanlora.core import location
from wanlora.core.location import Url
from wanlora.core.text import decode_utf8
from wanlora.errors import ConfigError

DEFAULT_MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


Heading = Literal[
    "Input and output", "Clips", "Adapter", "Training", "Checkpoints", "Previews", "Videos",
    "Maintenance", "Model and machine", "Options",
]  # fmt: skip
"""Headings of `--help`, in the order in which they appear."""


class Flag:
    """Marks a field, also of a nested group, that a person types every day.

    Args:
        names: Option names; empty for the field's own name with hyphens. A name after the first
            is an alias.
        heading: Heading in `--help` under which the flag appears.
        argument: Whether it is positional.
        bare: Value of the option when none follows it.
    """

    def __init__(
        self, *names: str, heading: Heading = "Options", argument: bool = False, bare: str = ""
    ) -> None:
        self.names = names
        self.heading = heading
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
    Flag(heading="Model and machine"),
]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="Seed of every random draw.")]
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
    Flag("--cache", heading="Input and output"),
]
ViewName = Annotated[
    str,
    Field(
        description="Name of the view in CACHE/views: letters, digits and . _ -",
        pattern=r"^[A-Za-z0-9][\w.-]*$",
    ),
    Flag(heading="Input and output"),
]


SourceRoot = Annotated[
    tuple[Path, ...],
    Field(
        description="Folder with the source videos, if they were moved since prepare: a source "
        "that is not at its path in the manifest is found here by the end of that path, for "
        "example walking/a.mp4; Windows paths too. Repeat for several."
    ),
    Flag(heading="Input and output"),
]


TokenizerOf = Annotated[
    str,
    Field(
        description="Model whose tokenizer counts captions, if it is on this machine; else an "
        "estimate, marked as such."
    ),
    Flag(heading="Model and machine"),
]


S = TypeVar("S", bound=Settings)


class Setting(NamedTuple):
    """A setting of a command.

    Attributes:
        name: Dotted name, for example lora.rank.
        field: Its type, default and description.
        flag: Its flag; None for a setting without one.
    """

    name: str
    field: FieldInfo
    flag: Flag | None

    @property
    def options(self) -> tuple[str, ...]:
        """Option names of its flag, the usual one first; empty without a flag."""
        if self.flag is None:
            return ()
        own = self.name.rpartition(".")[2].replace("_", "-")
        return self.flag.names or (own if self.flag.argument else f"--{own}",)


def settings_of(model: type[Settings], prefix: str = "") -> Iterator[Setting]:
    """List the settings of a command, and those of its nested groups."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from settings_of(kind, f"{prefix}{name}.")
        else:
            flag = next((item for item in field.metadata if isinstance(item, Flag)), None)
            yield Setting(prefix + name, field, flag)


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

    Args:
        model: The command's settings.
        file: TOML file.
        sets: Values of `--set`, NAME=VALUE.
        flags: Values of flags by dotted name.

    Raises:
        ConfigError: A key is unknown or a value is out of range; names the field and where it came
            from.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = _read_toml(file.expanduser())
    for item in sets:
        _assign(model, values, item)
    for name, value in (flags or {}).items():
        if value is not None:
            _set(values, name.split("."), value, origin=f"--{name.rpartition('.')[2]}")
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
        if setting.flag is None:
            words += _as_sets(setting.name, value)
            continue
        for item in value if isinstance(value, tuple) else [value]:
            text = str(item.absolute() if absolute and isinstance(item, Path) else item)
            if not setting.flag.argument:
                words.append(setting.options[0])
            if item is not True:
                words.append(text)
    return shlex.join(words)


def _as_sets(name: str, value: Any) -> list[str]:
    """Write a setting as arguments of `--set`."""
    if isinstance(value, dict):
        return [word for key, item in value.items() for word in _as_sets(f"{name}.{key}", item)]
    text = str(value)
    if isinstance(value, tuple | bool) or _reads_as_toml(text):
        text = json.dumps(value, default=str, ensure_ascii=False)
    return ["--set", f"{name}={text}"]


def _reads_as_toml(text: str) -> bool:
    try:
        return bool(tomllib.loads(f"value = {text}"))
    except (tomllib.TOMLDecodeError, RecursionError):
        return False


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
        return f"--{path.replace('_', '-')} is required: {_description(model, path)}"
    if kind == "string_pattern_mismatch":
        return f"{path}: found {found!r}, which does not fit. {_description(model, path)}"
    if kind in ("model_type", "model_attributes_type"):
        inside = ", ".join(name for name, *_ in settings_of(model) if name.startswith(f"{path}."))
        return f"{path} is a group of settings, not a value (found {found!r}); set one of: {inside}"
    if kind == "tuple_type":
        return f"{path}: expected a list, as in --set '{path}=[\"...\"]' (found {found!r})"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message} (found {found!r})" if path else message


def _unknown(model: type[Settings], path: str) -> str:
    """Name the settings there are, the likeliest first."""
    known = sorted(name for name, *_ in settings_of(model))
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
