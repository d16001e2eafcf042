"""Options of the command line, made from the settings of a command.

Owns: the options that every command has, and the headings of `--help`. Names, types, defaults and
descriptions come from `config`. Must not know: any stage.
"""

import inspect
import types
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from wanlora.config import (
    COMMANDS,
    ConfigConfig,
    Heading,
    RunConfig,
    Setting,
    Settings,
    settings_of,
)
from wanlora.config.describe import default_of
from wanlora.config.nearest import nearest
from wanlora.help_page import print_help

WITHOUT_FILE = (ConfigConfig, RunConfig)
"""Commands that have no settings of their own to read from --config or --set."""

# typer does not export the class that all errors of a command line have.
_UsageError: Any = typer.BadParameter.__base__


class Command(TyperCommand):
    """A command that is made from settings."""

    settings: type[Settings] = Settings
    bare: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType({})
    """Options that can be given without a value: the value used then, and all values."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  (typer's signature)
        """Print the help."""
        print_help(self, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words after the command's name."""
        given = []
        for word, following in zip(args, [*args, ""][1:], strict=True):
            given.append(word)
            alone, values = self.bare.get(word, ("", ()))
            if alone and following not in values:
                given.append(alone)
        try:
            return super().parse_args(ctx, given)
        except _UsageError as error:
            if hasattr(error, "possibilities"):  # only the error of an unknown option has them
                error.possibilities = None
                error.message = unknown_option(self.settings, str(error.option_name))
            raise


class Group(TyperGroup):
    """The program, with its commands by heading."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  (typer's signature)
        """Print the help."""
        print_help(self, ctx)


def command_class(config_type: type[Settings]) -> type[Command]:
    """Make the class of a command."""
    bare = {
        setting.options[0]: (
            setting.flag.bare,
            tuple(_value_kind(setting.field.annotation).split("|")),
        )
        for setting in settings_of(config_type)
        if setting.flag and setting.flag.bare
    }
    return type("Command", (Command,), {"settings": config_type, "bare": MappingProxyType(bare)})


def unknown_option(config_type: type[Settings], option: str) -> str:
    """Return the message for an unknown option: what the user probably meant."""
    command = next(name for name, model in COMMANDS.items() if model is config_type)
    others = [
        name
        for name, model in COMMANDS.items()
        if any(option in setting.options for setting in settings_of(model))
    ]
    lines = [f"No such option: {option}"]
    if config_type not in WITHOUT_FILE:
        meant = [_as_typed(setting) for setting in nearest(config_type, option)]
        if meant:
            lines.append(f"Use {' or '.join(meant)}.")
        elif others:
            lines.append(f"It is an option of: {', '.join(others)}.")
        lines.append(f"All settings: wanlora config {command}")
    return "\n".join(lines)


def _as_typed(setting: Setting) -> str:
    """Write a setting as a user types it: its flag, or --set."""
    if setting.flag:
        return setting.options[0].upper() if setting.flag.argument else setting.options[0]
    if get_origin(setting.field.annotation) is tuple:
        return f"--set '{setting.name}=[\"VALUE\"]'"
    return f"--set {setting.name}=VALUE"


def parameters(config_type: type[Settings]) -> list[inspect.Parameter]:
    """Make the parameters of a command: arguments, flags by heading, options of all commands."""
    flagged = [setting for setting in settings_of(config_type) if setting.flag]
    order = {heading: index for index, heading in enumerate(get_args(Heading))}
    flagged.sort(key=lambda setting: order[setting.flag.heading] if setting.flag else 0)
    own = {_python_name(setting) for setting in flagged}
    common = _COMMON[2:] if config_type in WITHOUT_FILE else _COMMON
    return [*map(_parameter_of, flagged), *(each for each in common if each.name not in own)]


def values_of(config_type: type[Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the flags that were given, by the dotted name of the setting."""
    values = {}
    for setting in settings_of(config_type):
        value = given.get(_python_name(setting))
        if value in (None, [], (), False):
            continue
        # typer 0.26.0 gives a tuple, later releases a list.
        many = isinstance(value, list | tuple)
        one = many and len(value) == 1 and str in _parts(setting.field)
        values[setting.name] = value[0] if one else value
    return values


def _python_name(setting: Setting) -> str:
    return setting.name.replace(".", "__")


def _parts(field: FieldInfo) -> tuple[Any, ...]:
    """Return the types of a union; of any other type itself."""
    if get_origin(field.annotation) in (Union, types.UnionType):
        return get_args(field.annotation)
    return (field.annotation,)


def _parameter(name: str, annotation: Any, info: Any, default: Any = None) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=Annotated[annotation, info], default=default)


def _parameter_of(setting: Setting) -> inspect.Parameter:
    flag, field = setting.flag, setting.field
    assert flag is not None
    name = _python_name(setting)
    kind = _value_kind(field.annotation)
    many = any(get_origin(part) is tuple for part in _parts(field))
    info: dict[str, Any] = {"help": _help(setting), "show_default": False}
    annotation: Any = list[str] | None if many else str | None
    info["rich_help_panel"] = flag.heading
    if flag.argument:  # optional for the parser: --config may give a required one
        return _parameter(name, annotation, typer.Argument(**info))
    if kind == "FLAG":
        return _parameter(name, bool, typer.Option(*setting.options, **info), default=False)
    if "|" in kind:
        info["autocompletion"] = lambda: kind.split("|")
    return _parameter(name, annotation, typer.Option(*setting.options, metavar=kind, **info))


def _value_kind(annotation: Any) -> str:
    """Name a field's type for the help."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        if get_origin(parts[0]) is Literal:  # a word or a value
            return "|".join(map(_value_kind, parts))
        return _value_kind(parts[0])
    if get_origin(annotation) is tuple:
        return _value_kind(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    names = {bool: "FLAG", int: "INT", float: "FLOAT", Path: "PATH"}
    return names.get(annotation, "TEXT")


def _help(setting: Setting) -> str:
    """Describe a setting, with its default: typer's own would be the absence of the flag."""
    text = str(setting.field.description)
    if setting.field.is_required():
        return f"{text} [required]"
    default = default_of(setting)
    return text if default in ("", "false") else f"{text} [default: {default}]"


_COMMON = [
    _parameter(
        "config_file",
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE.toml",
            show_default=False,
            help="Read settings from this file.",
        ),
    ),
    _parameter(
        "sets",
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            show_default=False,
            help="Set any setting by its dotted name; wanlora config COMMAND lists all.",
        ),
    ),
    _parameter(
        "as_json", bool, typer.Option("--json", help="Print the result as JSON."), default=False
    ),
]
