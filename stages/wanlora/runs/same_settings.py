"""Comparison of a run's settings with the recorded ones.

Owns: the settings that may change when a run continues. Must not know: files, models.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanlora.core.fingerprint import difference

MAY_CHANGE = frozenset(
    {
        "max_steps", "num_epochs", "save_steps", "save_minutes", "keep_checkpoints", "resume",
        "device", "activations", "eager", "attention", "prefetch_batches", "output_dir", "cache",
        "allow_untrained_base", "local_copy", "save_every_epoch", "trackers", "previews",
        "validation", "deterministic", "process_timeout_s", "model", "stream_blocks", "view",
    }
)  # fmt: skip
"""Settings that may change when a run continues: they do not change the trained weights, except by
the number of steps. The weights of the model and the content of the cache are compared separately,
with those of the checkpoint."""


def differing_settings(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the differences that make it another run."""
    return difference(_identity(recorded), _identity(wanted))


def same_settings(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a run has the wanted values of all settings that determine its result."""
    free = MAY_CHANGE - {"max_steps", "num_epochs", "model", "view"}
    both = [
        {key: value for key, value in without_none(each).items() if key not in free}
        for each in (recorded, wanted)
    ]
    if both[1]["optimizer"].get("warmup_steps") is None:  # the run recorded the steps that it used
        both[0].get("optimizer", {}).pop("warmup_steps", None)
    return both[0] == both[1]


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in MAY_CHANGE}
    return dict(without_none(kept))


def without_none(value: Any) -> Any:
    """Remove None values: TOML has no null."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return str(value) if isinstance(value, Path) else value
