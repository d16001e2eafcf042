"""The base model of a run: its folder, its variant, and the transformer that is trained.

Owns: the order in which they are found: configurations first, so that an unsupported model or a
missing `--expert` is refused before weights are downloaded. Must not import torch.
"""

from pathlib import Path
from typing import NamedTuple

from wanlora.wan.model_folder import SECOND, TRANSFORMER, resolve, resolve_configs, resolve_here
from wanlora.wan.variants import Expert, TransformerPart, Variant, variant_of


class Base(NamedTuple):
    """A model, and the transformer of it that is trained."""

    folder: Path
    variant: Variant
    part: TransformerPart


def find_base(model: str, expert: Expert | None) -> Base:
    """Find a model; of a model on the hub, only the transformer that is trained is downloaded.

    Args:
        model: See `model_folder.resolve`.
        expert: The expert to train; None for a model with one transformer.

    Raises:
        ModelError: The model cannot be used, its weights are missing, or `expert` does not fit it.
    """
    parts = (SECOND,) if expert == "low" else TRANSFORMER
    _, variant, part = _describe(resolve_configs(model, parts), expert)
    return Base(resolve(model, (part.subfolder,)), variant, part)


def find_base_here(model: str, expert: Expert | None) -> Base | None:
    """Find a model on this machine, like `find_base`; None for a hub id."""
    folder = resolve_here(model, ())
    if folder is None:
        return None
    if not any((folder / name).is_dir() for name in (*TRANSFORMER, SECOND)):
        resolve_here(model, TRANSFORMER)  # refuses the folder by the missing parts
    found = _describe(folder, expert)
    resolve_here(model, (found.part.subfolder,))
    return found


def _describe(folder: Path, expert: Expert | None) -> Base:
    variant = variant_of(folder, expert)
    return Base(folder, variant, variant.part(expert))
