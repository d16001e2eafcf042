"""Folder of a model on this machine, by the value of `--model`.

Owns: the embedded model, local folders, downloads, and the check that all parts are there.
Must not know: variants, torch or diffusers.
"""

import difflib
import importlib.resources
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from wanlora.core.kinds import Kind
from wanlora.core.out_of_memory import reason_of
from wanlora.core.text import LFS_REMEDY
from wanlora.errors import ModelError
from wanlora.files import is_lfs_pointer
from wanlora.wan.hub import check_room, network_errors
from wanlora.wan.weights import WEIGHT_NAMES, read_json, weight_files

MICRO = "micro"

TRANSFORMER = ("transformer",)
TEXT_ENCODER = ("text_encoder", "tokenizer")
ENCODERS = ("vae", *TEXT_ENCODER)
PIPELINE = (*ENCODERS, "transformer", "scheduler")
"""Parts of a model with one transformer; `pipeline_of` gives those of any model."""
IMAGE_ENCODER = ("image_encoder", "image_processor")
"""Parts that a model has which reads embeddings of the first frame (Wan2.1 image to video)."""
ENCODER_PARTS: dict[Kind, tuple[str, ...]] = {
    "latents": ("vae",),
    "text": TEXT_ENCODER,
    "cond_latents": ("vae",),
    "clip_vision": IMAGE_ENCODER,
}
"""Parts of a model that encode each kind of row."""
SECOND = "transformer_2"
"""The second transformer of a model with two."""

INDEX = "model_index.json"
_CONFIGS = (INDEX, "transformer/config.json", f"{SECOND}/config.json")

_CONFIG_NAMES = {
    "scheduler": "scheduler_config.json",
    "image_processor": "preprocessor_config.json",
}
"""Names of the configurations of parts without weights; the others have `config.json`."""

DEMO = "WANLORA_DEMO"
"""Environment variable that `wanlora demo` sets for its commands: its videos are drawn ones."""


def resolve(model: str, subfolders: Sequence[str]) -> Path:
    """Find the folder of a model; only the given sub-folders are required and downloaded.

    Args:
        model: `micro`, a local diffusers folder, or a hub id (downloaded at most once).
        subfolders: Required parts: `TRANSFORMER`, `ENCODERS` or `PIPELINE`.

    Raises:
        ModelError: The folder does not exist or is incomplete, or the hub cannot be reached.
    """
    return resolve_here(model, subfolders) or _download(model, subfolders, _patterns(subfolders))


def encoders_of(kinds: Iterable[Kind]) -> tuple[str, ...]:
    """Parts of a model that encode these kinds of rows, without repeats."""
    return tuple(dict.fromkeys(part for kind in kinds for part in ENCODER_PARTS[kind]))


def resolve_configs(model: str, subfolders: Sequence[str] = TRANSFORMER) -> Path:
    """Find the folder of a model, with what identifies its variant; downloads no weights.

    Args:
        model: See `resolve`.
        subfolders: The parts that are needed later, for the message when the hub cannot be reached.

    Raises:
        ModelError: The folder does not exist, or the hub cannot be reached.
    """
    return resolve_here(model, ()) or _download(model, subfolders, _CONFIGS)


def pipeline_of(folder: Path) -> tuple[str, ...]:
    """Parts that sampling needs: `PIPELINE`, a second transformer, and the image encoder's."""
    second = (SECOND,) if has_second(folder) else ()
    return (*PIPELINE, *second, *(IMAGE_ENCODER if has_image_encoder(folder) else ()))


def has_second(folder: Path) -> bool:
    """Return whether a model has two transformers, from model_index.json or its sub-folders."""
    return _has(folder, SECOND)


def has_image_encoder(folder: Path) -> bool:
    """Return whether a model has an image encoder, from model_index.json or its sub-folders."""
    return _has(folder, IMAGE_ENCODER[0])


def _has(folder: Path, part: str) -> bool:
    index = folder / INDEX
    if index.is_file():
        return read_json(index).get(part) not in (None, [None, None])
    return (folder / part).is_dir()


def resolve_pipeline(model: str) -> Path:
    """Find the folder of a model with all parts that sampling needs; see `resolve`."""
    return resolve(model, pipeline_of(resolve_configs(model, PIPELINE)))


def resolve_pipeline_here(model: str) -> Path | None:
    """Find the folder of a model on this machine with all parts that sampling needs.

    See `resolve_here`.
    """
    folder = resolve_here(model, ())
    return folder and resolve_here(model, pipeline_of(folder))


def resolve_here(model: str, subfolders: Sequence[str]) -> Path | None:
    """Find the folder of a model on this machine; None for a hub id, which nothing downloads.

    Args:
        model: See `resolve`.
        subfolders: The parts that are needed.

    Raises:
        ModelError: The folder does not exist or is incomplete.
    """
    folder = _micro_folder() if model == MICRO else local_folder(model)
    if folder is None:
        return None
    if missing := _missing(folder, subfolders):
        raise ModelError(
            f"the model in {folder} is incomplete: missing {', '.join(missing)}; expected a folder "
            "in diffusers' layout, as saved by WanPipeline.save_pretrained"
        )
    for file in (file for name in subfolders for file in sorted((folder / name).glob("*"))):
        if is_lfs_pointer(file):
            raise ModelError(f"{file} {LFS_REMEDY}")
    return folder


def find_downloaded(model: str, subfolders: Sequence[str]) -> Path | None:
    """Find the folder of a model without downloading anything; None if parts of it are missing.

    Args:
        model: See `resolve`.
        subfolders: The parts that are needed.

    Raises:
        ModelError: A local folder does not exist or is incomplete.
    """
    if folder := resolve_here(model, subfolders):
        return folder
    import huggingface_hub  # noqa: PLC0415  (a second to import, and only hub ids need it)
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:
        # With the patterns: without them the whole repository has to be there.
        folder = Path(
            huggingface_hub.snapshot_download(
                model, local_files_only=True, allow_patterns=_patterns(subfolders)
            )
        )
    except LocalEntryNotFoundError:
        return None
    return None if _missing(folder, subfolders) else folder


def local_folder(model: str) -> Path | None:
    """Folder that a `--model` value names; None for `micro` and for a hub id.

    Raises:
        ModelError: The value is not one of the three.
    """
    folder = Path(model).expanduser()
    if model == MICRO:
        return None
    if folder.is_dir():
        return folder.resolve()
    if _looks_like_hub_id(model):
        return None
    near = difflib.get_close_matches(model.strip().lower(), [MICRO], cutoff=0.75)
    known = " (did you mean micro?)" if near else ""
    raise ModelError(
        f"no model folder at {model}{known}; expected micro, a folder in diffusers' layout, "
        "or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def public_name(model: str) -> str:
    """Name a model without a path of this machine: micro, a hub id, or a folder's name.

    A folder in the hub's cache (`models--org--name/snapshots/...`) has its hub id.
    """
    folder = Path(model).expanduser()
    if model == MICRO or (_looks_like_hub_id(model) and not folder.is_dir()):
        return model
    for part in folder.parts:
        if found := re.fullmatch(r"models--(.+?)--(.+)", part):
            return f"{found[1]}/{found[2]}"
    return folder.name


def _micro_folder() -> Path:
    """Folder of the embedded model: it is part of the package."""
    return Path(str(importlib.resources.files("wanlora") / "micro" / "weights"))


def _looks_like_hub_id(model: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) is not None


def _patterns(subfolders: Sequence[str]) -> list[str]:
    """Files of a hub repository that are needed from some sub-folders."""
    kinds = ("json", "safetensors", "model")
    return [INDEX, *(f"{name}/*.{kind}" for name in subfolders for kind in kinds)]


def _download(model: str, subfolders: Sequence[str], patterns: Sequence[str]) -> Path:
    """Fetch files of a hub repository, or find them already fetched.

    Args:
        model: A hub id.
        subfolders: The parts that are needed now or later.
        patterns: The files that are needed now; `_CONFIGS` skips the checks of weights.
    """
    import huggingface_hub  # noqa: PLC0415  (a second to import, and only hub ids need it)
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    include = " ".join(f"'{name}/*'" for name in subfolders)
    command = f"hf download {model} --include {INDEX} {include} --local-dir FOLDER"
    advice = f"on a machine with access run\n  {command}\nthen pass --model FOLDER"
    try:
        if patterns is not _CONFIGS:
            check_room(model, patterns)
        folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise ModelError(f"{model} is gated: accept its terms, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{model} is neither a local folder nor a model on the hub (or it needs "
            "`hf auth login`); is the name mistyped?"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{model} is not a local folder and the hub cannot be reached ({reason_of(error)}); "
            f"{advice}"
        ) from None
    except network_errors() as error:
        raise ModelError(
            f"the download of {model} stopped ({reason_of(error)}); the same command continues "
            f"the download. Or {advice}"
        ) from None
    if patterns is not _CONFIGS and (missing := _missing(folder, subfolders)):
        raise ModelError(
            f"{model} is not wholly downloaded: missing {', '.join(missing)} in {folder}; {advice}"
        )
    return folder


def _missing(folder: Path, subfolders: Sequence[str]) -> list[str]:
    return [item for name in subfolders for item in _missing_in(folder / name)]


def _missing_in(part: Path) -> list[str]:
    """List what a sub-folder lacks: the folder, its configuration, or files of weights."""
    name = part.name
    if not part.is_dir():
        return [f"{name}/"]
    if name == "tokenizer":
        known = ("tokenizer.json", "spiece.model")
        return [] if any((part / file).is_file() for file in known) else [f"{name}/{known[0]}"]
    config = _CONFIG_NAMES.get(name, "config.json")
    missing = [] if (part / config).is_file() else [f"{name}/{config}"]
    if name in _CONFIG_NAMES:
        return missing
    if not any((part / file).is_file() for file in WEIGHT_NAMES):
        return [*missing, f"{name}/*.safetensors"]
    return missing + [f"{name}/{file.name}" for file in weight_files(part) if not file.is_file()]
