"""What a prompt is called in a file name, and how the captions of an activity are dealt out.

Owns: names and order alone. Knows nothing of stores or files.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

SLUG_LENGTH = 48

T = TypeVar("T")


class Dealt(NamedTuple):
    """A video to make: of which activity, of which prompt (or whatever stands for it), its seed."""

    activity: str
    prompt: str
    seed: int


def slug(prompt: str) -> str:
    """Shorten a prompt to a part of a file name: lower-case words joined by hyphens."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:SLUG_LENGTH].strip("-_") or "empty"


def deal(prompts: Mapping[str, Sequence[str]], num_videos: int, *, seed: int) -> list[Dealt]:
    """Plan `num_videos` of each activity, with seeds seed, seed + 1, ...

    Of many prompts an evenly spaced few are taken, few prompts are taken again with other seeds.

    Args:
        prompts: Prompts of each activity; none of them empty.
        num_videos: Videos of an activity.
        seed: Seed of the first video of each activity.
    """
    return [
        Dealt(activity, prompt, seed + number)
        for activity, known in sorted(prompts.items())
        for number, prompt in enumerate(_spread(known, num_videos))
    ]


def _spread(items: Sequence[T], num: int) -> list[T]:
    if num >= len(items):
        return [items[index % len(items)] for index in range(num)]
    return [items[index * len(items) // num] for index in range(num)]
