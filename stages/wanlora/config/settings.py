"""What the settings of all commands share: flags and common fields.

Owns: how a field becomes a flag. Must not know: torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from wanlora.core import location
from wanlora.core.location import Url

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
