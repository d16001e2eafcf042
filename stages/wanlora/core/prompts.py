"""Prompts as text: cleaning, identity, the part of a file name, and a plan of videos to make.

Owns: the text that is encoded, and the order of prompts. Must not know: stores, files, models.
"""

import html
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from wanlora.core.fingerprint import sha256_text

SLUG_LENGTH = 48

T = TypeVar("T")


class PromptAssignment(NamedTuple):
    """A video to make.

    Attributes:
        activity: Its activity.
        prompt: Its prompt, or the prompt's key.
        seed: Its seed.
    """

    activity: str
    prompt: str
    seed: int


def clean_prompt(text: str) -> str:
    """Clean a prompt as WanPipeline does (prompt_clean): ftfy, HTML entities, single spaces.

    Not idempotent: `< &amp;amp;amp;` loses two levels of entities each time. Clean a prompt once,
    immediately before it is encoded or hashed.
    """
    from ftfy import fix_text  # noqa: PLC0415  (0.1 s that --help does not need)

    text = html.unescape(html.unescape(fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def prompt_key(text: str) -> str:
    """Name a prompt by content: the hex sha256 of its cleaned text.

    Release 0.1.0 cleaned each prompt twice before it encoded it. A prompt that the second cleaning
    changes has a newline after its cleaned text, so that a cache of 0.1.0 has no row for it.
    """
    cleaned = clean_prompt(text)
    stays = cleaned.isascii() and "&" not in cleaned  # cleaning takes 0.1 ms
    stays = stays or clean_prompt(cleaned) == cleaned
    return sha256_text(cleaned if stays else f"{cleaned}\n")


def slug(prompt: str) -> str:
    """Shorten a prompt to a part of a file name: lower-case words joined by hyphens."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:SLUG_LENGTH].strip("-_") or "empty"


def assign_prompts(
    prompts: Mapping[str, Sequence[str]], num_videos: int, *, seed: int
) -> list[PromptAssignment]:
    """Plan `num_videos` of each activity, with seeds seed, seed + 1, ...

    If there are more prompts than videos, evenly spaced ones are used. If there are fewer, prompts
    are repeated with other seeds.

    Args:
        prompts: Prompts of each activity; none of them empty.
        num_videos: Number of videos per activity.
        seed: Seed of the first video of each activity.
    """
    return [
        PromptAssignment(activity, prompt, seed + number)
        for activity, known in sorted(prompts.items())
        for number, prompt in enumerate(_spread(known, num_videos))
    ]


def _spread(items: Sequence[T], num: int) -> list[T]:
    if num >= len(items):
        return [items[index % len(items)] for index in range(num)]
    return [items[index * len(items) // num] for index in range(num)]
