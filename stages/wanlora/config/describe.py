"""The type, bounds and default of a setting as text, for `--help`, documents and templates.

Owns: how a setting is shown to a person. Must not know: the command line.
"""

import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from wanlora.config.settings import Setting

MAX_EXACT = 2**53
"""Above this, not every integer is a float."""


def type_of(field: FieldInfo) -> str:
    """Describe the values that a setting accepts, for example `integer ≥ 1`."""
    return _type(field.annotation) + _bounds(field)


def default_of(setting: Setting) -> str:
    """Describe the default of a setting; empty if there is nothing to describe."""
    value = setting.field.default
    if value is None or setting.field.is_required():
        return setting.unset
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, tuple | dict) else str(value)


def as_toml(value: Any) -> str:
    """Write a value as TOML: a text, number, true or false, or a list of these.

    A float without a fraction becomes an integer, as a user writes it: 10 and not 10.0.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_EXACT:
        value = int(value)
    return json.dumps(value, default=str, ensure_ascii=False)


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
