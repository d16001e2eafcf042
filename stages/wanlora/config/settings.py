"""Definition of a setting, and the settings that several commands share.

Owns: how a field becomes a flag. Must not know: torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast, get_args

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
from pydantic_core import PydanticUndefined

from wanlora.core import location
from wanlora.core.location import Url
from wanlora.cost.memory import Quantize

T = TypeVar("T")

Heading = Literal[
    "Input and output", "Clips", "Adapter", "Training", "Checkpoints", "Previews", "Videos",
    "Maintenance", "Model and machine", "Options",
]  # fmt: skip
"""Headings of `--help`, in the order in which they appear."""


class Flag(NamedTuple):
    """Flag of a setting on the command line.

    Attributes:
        heading: Heading of `--help` that lists the flag.
        names: Names of the flag, aliases last; empty for the name of the setting with hyphens.
        argument: True for a positional argument.
        bare: Value of the flag if it is given without a value.
    """

    heading: Heading
    names: tuple[str, ...] = ()
    argument: bool = False
    bare: str = ""


def setting(
    default: T,
    description: str,
    *,
    flag: Heading | None = None,
    names: tuple[str, ...] = (),
    argument: bool = False,
    bare: str = "",
    unset: str = "",
    **bounds: Any,
) -> T:
    """Define a setting.

    For example `rank: int = setting(32, "Rank of the adapter.", ge=1, flag="Adapter")`.

    Args:
        default: Its default.
        description: Its text in `--help` and docs/configuration.md.
        flag: Heading of `--help` for its flag. Without one, it is set by `--set` or in a file.
        names: See `Flag`.
        argument: See `Flag`.
        bare: See `Flag`.
        unset: For a default of None: the value used then, in words, for example "the rank".
        bounds: Bounds of pydantic's Field, for example ge=1 or pattern="...".
    """
    extra: dict[str, Any] = {
        "flag": Flag(flag, names, argument, bare) if flag else None,
        "unset": unset,
    }
    return cast("T", Field(default, description=description, json_schema_extra=extra, **bounds))


def described(description: str, **options: Any) -> Any:
    """Define a setting inside Annotated: one without a default, or one of several commands."""
    return setting(PydanticUndefined, description, **options)


class Settings(BaseModel):
    """Settings of a command or of a group in it: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_paths(cls, value: Any, info: ValidationInfo) -> Any:
        """Read the paths of all commands in the same way; a location parses its URLs itself."""
        kinds = _kinds(cls.model_fields[info.field_name].annotation) if info.field_name else set()
        if Path not in kinds or Url in kinds:
            return value
        if isinstance(value, list | tuple):
            return [location.parse_path(v) if isinstance(v, str | Path) else v for v in value]
        return location.parse_path(value) if isinstance(value, str | Path) else value


class Setting(NamedTuple):
    """A setting of a command.

    Attributes:
        name: Dotted name, for example lora.rank.
        field: Its type, default and description.
        flag: Its flag; None for a setting without one.
        unset: Default that is used for None, in words; empty if None means "nothing".
    """

    name: str
    field: FieldInfo
    flag: Flag | None
    unset: str

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
            extra = cast("dict[str, Any]", field.json_schema_extra)
            yield Setting(prefix + name, field, extra["flag"], extra["unset"])


def _kinds(annotation: Any) -> set[Any]:
    """List the types inside an annotation."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}


DEFAULT_MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"

CacheLocation = Annotated[
    Path | Url, BeforeValidator(location.parse), PlainSerializer(str, return_type=str)
]
CacheDir = Annotated[
    CacheLocation,
    described(
        "Cache: a folder (with store.zarr and views/), or a URL such as s3://bucket/prefix "
        "(docs/cache.md).",
        flag="Input and output",
        names=("--cache",),
    ),
]
ViewName = Annotated[
    str,
    described(
        "Name of the view in CACHE/views: letters, digits and . _ -",
        flag="Input and output",
        pattern=r"^[A-Za-z0-9][\w.-]*$",
    ),
]
SourceRoot = Annotated[
    tuple[Path, ...],
    described(
        "Folder with the source videos, if they were moved after prepare. A source that is not at "
        "its path in the manifest is looked up here by the end of that path, for example "
        "walking/a.mp4 (Windows paths too). Repeat for several.",
        flag="Input and output",
    ),
]
HtmlClips = Annotated[
    int, described("Maximum number of clips on the page, about 10 kB each.", ge=1)
]
TokenizerOf = Annotated[
    str,
    described(
        "Model whose tokenizer counts the tokens of captions. If it is not on this machine, the "
        "counts are estimates and are marked as such.",
        flag="Model and machine",
    ),
]
Device = Annotated[
    str,
    described(
        "Device to compute on: auto, cpu, cuda, cuda:1 or mps. auto selects CUDA, and a CPU only "
        "for the micro model; it never selects mps.",
        flag="Model and machine",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    ),
]
BaseDtype = Annotated[
    Literal["auto", "bfloat16", "float32"],
    described("Data type of the transformer; auto: bfloat16 on a GPU, float32 on a CPU."),
]
QuantizeAsTrained = Annotated[
    Quantize | None,
    described(
        "Format of the weights in the blocks: none, int8 or fp8; both of the latter take half the "
        "memory of bfloat16.",
        flag="Model and machine",
        unset="the format in the training of the adapters",
    ),
]


def _auto_or_number(value: Any) -> Any:
    if value != "auto" and not str(value).isdecimal():
        raise ValueError("must be auto, or a number of blocks of at least 0")
    return value


StreamBlocks = Annotated[
    Literal["auto"] | int,
    BeforeValidator(_auto_or_number),
    described(
        "Number of transformer blocks whose frozen weights stay in host memory and are copied to "
        "the GPU shortly before they are used; 0: none. Results are the same. auto: as few as the "
        "memory of the GPU requires.",
        flag="Model and machine",
    ),
]
Steps = Annotated[
    int | None,
    described("Denoising steps.", ge=1, flag="Videos", unset="the number of the variant"),
]
Guidance = Annotated[
    float | None,
    described(
        "Scale of classifier-free guidance.", ge=0, flag="Videos", unset="the scale of the variant"
    ),
]
GuidanceLow = Annotated[
    float | None,
    described(
        "Scale of classifier-free guidance of the low-noise expert, for models with two "
        "transformers.",
        ge=0,
        flag="Videos",
        unset="--guidance-scale if it is set, otherwise the scale of the variant",
    ),
]
AdapterHigh = Annotated[
    tuple[str, ...],
    described(
        "Adapter for the high-noise expert of a model with two transformers, as PATH or "
        "PATH=SCALE: for files of other tools, whose header does not name the expert.",
        flag="Input and output",
    ),
]
AdapterLow = Annotated[
    tuple[str, ...],
    described("The same for the low-noise expert.", flag="Input and output"),
]
Height = Annotated[
    int | None, described("Height in pixels.", flag="Videos", unset="chosen like --num-frames")
]
Width = Annotated[
    int | None, described("Width in pixels.", flag="Videos", unset="chosen like --num-frames")
]
Sampler = Literal["logit_normal", "uniform", "mode"]


def refuse_guidance_without_effect(high: float | None, low: float | None) -> None:
    """Check the guidance of two transformers: without that of the first, diffusers has none.

    Args:
        high: `guidance_scale`.
        low: `guidance_scale_low`.

    Raises:
        ValueError: Only `low` is above 1.
    """
    if high is not None and low is not None and high <= 1 < low:
        raise ValueError(
            "--guidance-scale of 1 or less means no guidance for either expert: leave out "
            "--guidance-scale-low, or raise --guidance-scale"
        )


def model_setting(unset: str, use: str = "Model") -> str | None:
    """Define the model of a command that has a default of its own."""
    text = f"{use}: micro (embedded), a local diffusers folder, or a Hugging Face model id."
    return setting(None, text, flag="Model and machine", unset=unset)


def seed_setting(flag: Heading) -> int:
    """Define the seed of a command."""
    return setting(0, "Seed of all random numbers.", ge=0, lt=2**63, flag=flag)
