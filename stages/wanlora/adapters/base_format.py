"""Format of the base's weights that adapters are used with: as set, or as in their training.

Owns: this choice, and refusing a DoRA on quantized weights. Must not import torch.
"""

import logging
from collections.abc import Sequence
from typing import cast

from wanlora.adapters.header import AdapterHeader
from wanlora.core import units
from wanlora.cost.memory import Quantize
from wanlora.errors import AdapterError

logger = logging.getLogger(__name__)


def format_of_base(
    setting: Quantize | None, headers: Sequence[AdapterHeader], *, log: bool = True
) -> Quantize:
    """Select the format of the base's weights, one for all adapters and for the base alone.

    Args:
        setting: The `--quantize` value; None = the format in the training of the adapters.
        headers: The adapters; those of other tools, which record no format, do not count.
        log: Log a format that was not set.

    Raises:
        AdapterError: The adapters were trained with different formats, or a DoRA would be used
            with quantized weights.
    """
    trained: dict[Quantize, list[str]] = {}
    for header in headers:
        if "model" in header.provenance:
            found = cast("Quantize", header.provenance.get("quantize", "none"))
            trained.setdefault(found, []).append(str(header.path))
    if setting is None and len(trained) > 1:
        listed = "; ".join(f"{kind}: {units.names(paths)}" for kind, paths in trained.items())
        raise AdapterError(
            "the adapters were trained on base weights of different formats, and one base is "
            f"used for all of them: pass --quantize none, int8 or fp8. Formats: {listed}"
        )
    default: Quantize = "none"
    chosen = next(iter(trained), default) if setting is None else setting
    if chosen == "none":
        return chosen
    if setting is None and log:
        logger.info(
            "the base's weights are quantized to %s, as in the training of %s; --quantize none "
            "uses them as they are", chosen, units.names(trained[chosen]),
        )  # fmt: skip
    for header in headers:
        if any(key.part == "magnitude" for key in header.keys.values()):
            raise AdapterError(
                f"{header.path} is a DoRA, whose magnitudes are for the base's own weights: pass "
                "--quantize none"
            )
    return chosen
