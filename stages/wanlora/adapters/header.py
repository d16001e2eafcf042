"""An adapter without its tensors: its file, its keys, and the records in its header.

Owns: `PATH=SCALE`, finding the file, the expert that an adapter is for, and refusing a file with
keys that cannot be used. Must not import torch: a command reads headers before it loads anything.
"""

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import safetensors

from wanlora.adapters.names import Key, read_key
from wanlora.core import units
from wanlora.core.location import parse_path
from wanlora.core.text import LFS_REMEDY
from wanlora.errors import AdapterError
from wanlora.files import is_lfs_pointer
from wanlora.wan.variants import VARIANTS, Expert

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PROVENANCE_PREFIX = "wanlora."
EXPERT_KEY = f"{PROVENANCE_PREFIX}expert"
_NAMED_EXPERT = re.compile(r"(?<![a-z])(high|low)[-_. ]?noise(?![a-z])", re.IGNORECASE)
RANGE_KEY = "modelspec.timestep_range"
"""Field of other tools' headers: range of timesteps (1000 sigma) of the training, `875,1000`."""


def timestep_range(sigmas: tuple[float, float]) -> str:
    """Format a range of sigma as `RANGE_KEY` has it."""
    return f"{1000 * sigmas[0]:g},{1000 * sigmas[1]:g}"


_RANGES = {
    timestep_range(part.sigmas): part.expert
    for row in VARIANTS.values()
    for part in row.transformers
}


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """Names and metadata of an adapter file, from any trainer.

    Attributes:
        path: The file.
        keys: Meaning of each of its keys; in a file for two transformers, of one transformer's.
        header: The file's own header, unchanged.
        expert: Transformer that the adapter is for, in a model with two: recorded by wanlora, or
            named in the keys. None for a model with one, and for most files of other tools.
    """

    path: Path
    keys: dict[str, Key]
    header: dict[str, str]
    expert: Expert | None

    @property
    def provenance(self) -> dict[str, str]:
        """Values that this project recorded beside the tensors, without the `wanlora.` prefix."""
        return provenance_of(self.header)


def provenance_of(header: Mapping[str, str]) -> dict[str, str]:
    """Select the fields with the `wanlora.` prefix, and remove it."""
    return {
        key.removeprefix(PROVENANCE_PREFIX): value
        for key, value in header.items()
        if key.startswith(PROVENANCE_PREFIX)
    }


def read_header(path: Path) -> AdapterHeader:
    """Find an adapter, and read everything except its tensors.

    Args:
        path: A file, or the folder of a run or of PEFT.

    Raises:
        AdapterError: There is no adapter, there are several, a key is not one of a plain LoRA of
            Wan's linear modules, or the file is for two transformers.
    """
    header, *others = read_headers(path)
    if others:
        parts = "; ".join(
            f"{len(part.keys)} tensors for the {part.expert}-noise expert, such as "
            f"{next(iter(part.keys))}"
            for part in (header, *others)
        )
        command = ["wanlora", "export", "--adapter", str(header.path)]
        command += ["--output", "NAME.safetensors"]
        raise AdapterError(
            f"{header.path} holds weights for two transformers: {parts}. An adapter is for one of "
            f"them: split the file with\n  {shlex.join(command)}"
        )
    return header


def read_headers(path: Path) -> list[AdapterHeader]:
    """Read an adapter as `read_header` does, but allow a file for two transformers.

    Args:
        path: A file, or the folder of a run or of PEFT.

    Returns:
        The adapter; two for a file with weights for two transformers, the high-noise expert first.

    Raises:
        AdapterError: See `read_header`.
    """
    file = _find(path)
    with opened(file, framework="np") as content:
        header, names = content.metadata() or {}, list(content.keys())
    keys = _read_keys(file, names)
    recorded = _recorded_expert(file, header)
    if not any(key.expert for key in keys.values()):
        return [AdapterHeader(file, keys, header, recorded)]
    # Without a number, a name means the first transformer: transformer. beside transformer_2.
    parts: dict[Expert, dict[str, Key]] = {"high": {}, "low": {}}
    for name, key in keys.items():
        parts[key.expert or "high"][name] = key
    found = [AdapterHeader(file, own, header, expert) for expert, own in parts.items() if own]
    if recorded and [part.expert for part in found] != [recorded]:
        raise AdapterError(
            f"{file} records the {recorded}-noise expert in {EXPERT_KEY}, and its keys are of the "
            f"{' and the '.join(f'{part.expert}-noise' for part in found)} expert, such as "
            f"{next(iter(found[-1].keys))}; its header or its keys were changed"
        )
    return found


def _recorded_expert(file: Path, header: Mapping[str, str]) -> Expert | None:
    """Read the expert that wanlora recorded.

    Raises:
        AdapterError: It is neither high nor low.
    """
    recorded = header.get(EXPERT_KEY)
    if recorded is None or recorded in get_args(Expert):
        return cast("Expert | None", recorded)
    raise AdapterError(f"{file}: {EXPERT_KEY} in its header is {recorded!r}; expected high or low")


@contextmanager
def opened(file: Path, *, framework: str) -> Iterator[Any]:
    """Open a safetensors file.

    Args:
        file: The file.
        framework: `np`, which needs no torch and has no bfloat16; or `pt`.

    Raises:
        AdapterError: It is not a safetensors file.
    """
    try:
        with safetensors.safe_open(file, framework=framework) as content:
            yield content
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        problem = LFS_REMEDY if is_lfs_pointer(file) else f"is not a safetensors adapter: {error}"
        raise AdapterError(f"{file} {problem}") from None


def split_scale(text: str, *, flag: str = "--adapter") -> tuple[Path, float]:
    """Split the value of `--adapter`: PATH or PATH=SCALE; without a scale it is 1.

    A path that exists is taken whole, `=` and all.

    Args:
        text: The value.
        flag: Its flag, for messages.

    Raises:
        AdapterError: The scale is not a finite number.
    """
    path, equals, tail = text.rpartition("=")
    try:
        whole, path_before = parse_path(text), parse_path(path or text)
    except ValueError as error:
        raise AdapterError(f"{flag} {error}") from None
    if not equals or whole.exists():
        return whole, 1.0
    try:
        scale = float(tail)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise AdapterError(
            f"{flag} {text}: expected PATH or PATH=SCALE with a number such as 0.8, and found "
            f"neither a file {text} nor a number {tail!r}"
        )
    return path_before, scale


def expert_and_place(header: AdapterHeader) -> tuple[Expert | None, str]:
    """Find the expert of an adapter, also in a file of another tool that only shows it.

    musubi-tuner records the range of timesteps; ai-toolkit, DiffSynth-Studio and lightx2v name
    their files `..._high_noise.safetensors`. Files of wanlora record the expert, and nothing else
    in them counts.

    Returns:
        The expert and its source: header, keys, name or `RANGE_KEY`. None and
        an empty text if the file does not show it, or shows two different ones.
    """
    if header.expert:
        return header.expert, "header" if EXPERT_KEY in header.header else "keys"
    if "model" in header.provenance:
        return None, ""
    by_range = _RANGES.get(header.header.get(RANGE_KEY, ""))
    by_name = expert_in_name(header.path.name)
    if by_range and by_name in (None, by_range):
        return by_range, RANGE_KEY
    return (by_name, "name") if by_name and not by_range else (None, "")


def sigmas_of(expert: Expert | None, variant: str | None) -> tuple[float, float] | None:
    """Range of sigma of an expert; None without one, or if the variant is not known."""
    row = VARIANTS.get(variant or "")
    parts = row.transformers if row else ()
    return next((part.sigmas for part in parts if expert and part.expert == expert), None)


def expert_in_name(name: str) -> Expert | None:
    """Find the one expert in a file's name, for example `person_high_noise.safetensors`."""
    experts = {found.lower() for found in _NAMED_EXPERT.findall(name)}
    return cast("Expert", experts.pop()) if len(experts) == 1 else None


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise AdapterError(f"no adapter at {path}; expected a run's folder or a .safetensors file")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{path} holds no {ADAPTER_FILE}; has the run saved an adapter yet?")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise AdapterError(f"{path} holds {len(files)} adapters ({names}); pass the file itself")
    return files[0]


def _read_keys(file: Path, found: Iterable[str]) -> dict[str, Key]:
    """Parse every key.

    Raises:
        AdapterError: A key cannot be used; names some of them, by reason.
    """
    keys = {key: read_key(key) for key in found}
    if not keys:
        raise AdapterError(f"{file} holds no tensors")
    reasons: dict[str, list[str]] = {}
    for key, value in keys.items():
        if isinstance(value, str):
            reasons.setdefault(value, []).append(key)
    if reasons:
        listed = [f"{units.names(sorted(names))}: {reason}" for reason, names in reasons.items()]
        raise AdapterError(
            f"{file} holds {sum(map(len, reasons.values()))} tensors that cannot be used, and an "
            f"adapter is used whole or not at all. {units.names(sorted(listed), separator='; ')}"
        )
    return {key: value for key, value in keys.items() if isinstance(value, Key)}
