"""An earlier evaluation in the output folder: it is continued, replaced or kept.

Owns: the rule. A new evaluation replaces an earlier one if it contains all of its findings.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wanlora.core.fingerprint import difference
from wanlora.errors import RunError

NOT_COMPARED = frozenset({"wanlora", "cache", "model", "best"})
"""Fields that may differ between the two; weights are compared by content."""
FOUND = frozenset(
    {"validation", "adapters", "videos", "video_settings", "best_by_expert", "joined", "gains",
     "answer"}
)  # fmt: skip


def require_replaceable(
    path: Path, question: Mapping[str, Any], adapters: Sequence[tuple[str, float]]
) -> bool:
    """Refuse to replace an evaluation of something else.

    Args:
        path: evaluation.json.
        question: Fields of the new evaluation that are fixed before anything is measured.
        adapters: Hex sha256 and scale of each adapter.

    Returns:
        True if there is an earlier evaluation with videos.

    Raises:
        RunError: Findings of the earlier one would be lost, or the file is not an evaluation.
    """
    if not path.exists():
        return False
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        theirs = {(item["sha256"], float(item["scale"])) for item in old["adapters"]}
        settings = dict(old["video_settings"])
        differing = _differing(old, question)
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        raise RunError(f"{path} is damaged or of something else: {_WAY_OUT}") from None
    if old["videos"]:
        wanted = dict(question["video_settings"])
        number = "videos_per_activity"  # more may be added
        settings[number] = max(settings[number], wanted[number])
        differing += difference(settings, wanted)
    if lost := len(theirs - set(adapters)):
        differing.append(f"{lost} of its {len(theirs)} adapters are not compared now")
    if differing:
        raise RunError(
            f"{path} is an evaluation of something else:\n  " + "\n  ".join(differing)
            + f"\n{_WAY_OUT}"
        )  # fmt: skip
    return bool(old["videos"])


_WAY_OUT = "choose another --output-dir, or move the file away"


def _differing(old: Mapping[str, Any], question: Mapping[str, Any]) -> list[str]:
    """List the fields with another value, and fields that a person added to the file."""
    known = question.keys() | FOUND | NOT_COMPARED
    wanted = {key: question[key] for key in question.keys() - FOUND - NOT_COMPARED}
    found = {key: value for key, value in old.items() if key in wanted or key not in known}
    if "experts" in old and "experts" in question:  # one expert may be added to the other
        for key in ("experts", "weights"):
            both = wanted[key].keys() & found[key].keys()
            for fields in (found, wanted):
                fields[key] = {name: fields[key][name] for name in both}
        for fields in (found, wanted):
            del fields["sigmas"]  # those of all experts; each has its own
    return difference(found, json.loads(json.dumps(wanted)))
