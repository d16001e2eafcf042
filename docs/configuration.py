"""Writes docs/configuration.md from the config models, as `make docs`; a test finds it stale."""

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from wanlora.config import COMMANDS, Setting, Settings, settings_of

HEAD = """# Configuration

Made from the models in `stages/wanlora/config/` by `make docs`; edit those.

Every setting can be given as `--set NAME=VALUE` (the value is TOML: `--set lora.rank=16`, `--set
lora.targets='["to_q", "to_v"]'`) or in a file, `--config run.toml`. The ones with a flag
are typed every day. Later wins: default, file, `--set`, flag.
"""


def reference() -> str:
    """Write the whole page as Markdown."""
    parts = [HEAD]
    for command, model in COMMANDS.items():
        parts.append(f"## wanlora {command}\n\n{model.__doc__}\n\n" + _table(model))
    return "\n".join(parts)


def _table(model: type[Settings]) -> str:
    rows = ["| setting | flag | type | default | |", "|---|---|---|---|---|"]
    return "\n".join([*rows, *_rows(model)]) + "\n"


def _rows(model: type[Settings]) -> list[str]:
    rows = []
    for setting in settings_of(model):
        field = setting.field
        cells = (
            f"`{setting.name}`",
            _flag(setting),
            _type(field.annotation) + _bounds(field),
            "required" if field.is_required() else f"`{_default(field.default) or 'empty'}`",
            field.description or "",
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _flag(setting: Setting) -> str:
    if setting.flag and setting.flag.argument:
        return "positional"
    return ", ".join(f"`{name}`" for name in setting.options)


def _type(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_type(part) for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        return "list of " + _type(get_args(kind)[0])
    if get_origin(kind) is dict:
        return f"table of {_type(get_args(kind)[1])}"
    if get_origin(kind) is Annotated:
        return _type(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    names = {bool: "true/false", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(kind, getattr(kind, "__name__", str(kind)).lower())


def _bounds(field: FieldInfo) -> str:
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    found = [
        f"{signs[type(item)][0]} {getattr(item, signs[type(item)][1]):g}"
        for item in field.metadata
        if type(item) in signs and not str(item).endswith(f"{2**63})")
    ]
    return f" {', '.join(found)}" if found else ""


def _default(value: Any) -> str:
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(reference())
