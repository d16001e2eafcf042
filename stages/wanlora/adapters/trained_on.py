"""The kind of model that an adapter was trained on: text to video, or image to video.

Owns: refusing an adapter of the other kind. Must not import torch: a command checks this before it
loads anything.

The linear modules of Wan's T2V-14B, T2V-A14B and I2V-A14B have the same names and shapes, so an
adapter of one loads into the others without an error. Wan2.1's I2V-14B has more of them.
"""

import logging
from dataclasses import replace
from typing import Literal

from wanlora.adapters.header import AdapterHeader
from wanlora.core import units
from wanlora.cost.flops import TransformerShape
from wanlora.errors import AdapterError
from wanlora.wan.variants import VARIANTS, Variant

_IMAGE_MODULES = (".add_k_proj", ".add_v_proj", "condition_embedder.image_embedder.")

Kind = Literal["T2V", "I2V"]
"""Kind of model: text to video, or image to video."""

logger = logging.getLogger(__name__)


def trained_on(header: AdapterHeader) -> str:
    """Name the model that an adapter's header records."""
    recorded = header.provenance
    variant, model = recorded.get("variant"), recorded.get("model")
    if model and variant:
        return f"{model} ({variant})"
    return model or variant or "another model"


def check_kind(header: AdapterHeader, variant: Variant, *, text: str, model: str) -> None:
    """Refuse an adapter of a text-to-video model on an image-to-video model, and the reverse.

    Args:
        header: The adapter.
        variant: Variant of the model.
        text: Name of the adapter in the message: its flag and its file.
        model: The `--model` value.

    Raises:
        AdapterError: The header records the other kind; or the adapter changes modules that read
            the embeddings of the image, which the model does not have.
    """
    trained = _recorded(header)
    if trained and trained.is_i2v != variant.is_i2v:
        raise AdapterError(
            f"{text} was trained on {trained_on(header)}, {_kind(trained)}, and {model} "
            f"({variant.name}) is {_kind(variant)}: pass the --model that it was trained on"
        )
    if not variant.shape.image_dim and (names := image_modules(header)):
        raise AdapterError(
            f"{text} changes {units.names(names)}, which read the embeddings of an image and which "
            f"only Wan2.1's image-to-video model (i2v-14b) has; {model} is {variant.name}: pass "
            "the --model that it was trained on"
        )


def image_modules(header: AdapterHeader) -> list[str]:
    """List the modules of an adapter that read the embeddings of the image, sorted."""
    modules = {key.module for key in header.keys.values()}
    return sorted(name for name in modules if any(part in name for part in _IMAGE_MODULES))


def kind_of(header: AdapterHeader) -> Kind | None:
    """Kind of model that an adapter is for: T2V or I2V; None if the file does not show it."""
    if trained := _recorded(header):
        return "I2V" if trained.is_i2v else "T2V"
    return "I2V" if image_modules(header) else None


def log_unknown_kind(header: AdapterHeader, variant: Variant, *, model: str) -> None:
    """Log that an adapter may be for the other kind of model, if its file does not show the kind.

    Nothing is logged if no model of the other kind has linear modules of the same shapes.
    """
    same = (row for row in VARIANTS.values() if _linears(row.shape) == _linears(variant.shape))
    if kind_of(header) is None and any(row.is_i2v != variant.is_i2v for row in same):
        logger.info(
            "%s does not record the model that it was trained on. %s (%s) is %s, and adapters of "
            "the other kind have the same shapes: this cannot be checked",
            header.path, model, variant.name, _kind(variant),
        )  # fmt: skip


def _recorded(header: AdapterHeader) -> Variant | None:
    return VARIANTS.get(header.provenance.get("variant", ""))


def _kind(variant: Variant) -> str:
    return "an image-to-video model" if variant.is_i2v else "a text-to-video model"


def _linears(shape: TransformerShape) -> TransformerShape:
    """Shape without the size of the input, which no linear module of a block has."""
    return replace(shape, in_channels=0)
