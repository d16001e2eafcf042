"""The prompts of `sample`, each with its seeds: of the flags, of a file, or of a cache.

Owns: the format of a file of prompts. Must not know: the files of the videos.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanlora.config import ACTIVITY
from wanlora.core.location import Location
from wanlora.core.prompts import PromptAssignment, assign_prompts
from wanlora.core.text import decode_utf8, parse_json, shorten, without_surrogates
from wanlora.errors import ConfigError
from wanlora.store.views import View


def repeat(
    prompt: str, num_videos: int, *, seed: int, activity: str = ""
) -> list[PromptAssignment]:
    """Assign one prompt to `num_videos` videos, with seeds seed, seed + 1, ..."""
    return [PromptAssignment(activity, prompt, seed + index) for index in range(num_videos)]


def of_file(path: Path, num_videos: int, *, seed: int) -> list[PromptAssignment]:
    """Assign the prompts of a file, each from its own seed if it has one.

    Raises:
        ConfigError: See `read_prompts`.
    """
    return [
        item
        for prompt, own_seed in read_prompts(path)
        for item in repeat(prompt, num_videos, seed=seed if own_seed is None else own_seed)
    ]


def of_templates(
    templates: Sequence[str], view: View, num_videos: int, *, cache: Location, seed: int
) -> list[PromptAssignment]:
    """Assign each template to every activity of a view, whose name replaces `{activity}`.

    Raises:
        ConfigError: The clips of the view have no activities.
    """
    activities = sorted({clip.activity for clip in view.clips} - {""})
    if not activities:
        raise ConfigError(
            f"the clips of view {view.name!r} of {cache} have no activities to replace {ACTIVITY}: "
            "leave out --cache or --prompt"
        )
    return [
        item
        for template in templates
        for name in activities
        for item in repeat(template.replace(ACTIVITY, name), num_videos, seed=seed, activity=name)
    ]


def of_captions(
    cache: Location, view: View, split: str, num_videos: int, *, seed: int
) -> list[PromptAssignment]:
    """Assign captions of the clips of a split, `num_videos` for each activity.

    Raises:
        StoreError: The split has no clips, or a caption is missing in the store.
    """
    from wanlora.store.captions import captions  # noqa: PLC0415  (imports zarr)
    from wanlora.store.reader import StoreReader  # noqa: PLC0415

    reader = StoreReader.of_view(cache, view)
    known = {name: list(texts) for name, texts in captions(reader, view, split).items()}
    return assign_prompts(known, num_videos, seed=seed)


def read_prompts(path: Path) -> list[tuple[str, int | None]]:
    """Read a file of prompts: lines of text, or JSON objects with `prompt` and optionally `seed`.

    Blank lines are skipped, in a text file also lines that start with `#`. A .json file may hold
    one list.

    Raises:
        ConfigError: It cannot be read, holds no prompt, or a line is not a prompt.
    """
    try:
        text = decode_utf8(path.read_bytes())
        items = _items(path, text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--prompts {path} cannot be read: {reason}") from None
    if not items:
        raise ConfigError(f"--prompts {path} holds no prompts; expected one per line")
    if path.suffix.lower() in (".jsonl", ".json"):
        return [_of_json(path, where, item) for where, item in items]
    return [(_of_text(path, where, str(item)), None) for where, item in items]


def _items(path: Path, text: str) -> list[tuple[str, Any]]:
    """Split a file into pairs such as (`line 3`, item)."""
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        return [(f"item {n}", item) for n, item in enumerate(parse_json(text), 1)]
    # Not splitlines: a prompt may hold other separators than the newline.
    lines = [(f"line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1)]
    is_json = path.suffix.lower() in (".jsonl", ".json")
    return [(where, line) for where, line in lines if line and (is_json or line[0] != "#")]


_OPTION = re.compile(r"(?:^|\s)(--[a-z][a-z-]*)(?:\s|$)")
"""Options in a line of other tools' prompt files, such as kohya's `--n`, `--w`, `--d`."""


def _of_text(path: Path, where: str, line: str) -> str:
    if option := _OPTION.search(line):
        raise ConfigError(
            f"--prompts {path}, {where}: {option[1]} would be read as part of the prompt. Settings "
            "are options of the command (--negative-prompt, --width, --height, --num-frames, "
            "--steps, --guidance-scale); a .jsonl file may give each prompt its seed: "
            '{"prompt": "a dog", "seed": 0}'
        )
    return line


def _of_json(path: Path, where: str, item: Any) -> tuple[str, int | None]:
    found = shorten(item) if isinstance(item, str) else f"{item!r:.80}"
    if isinstance(item, str) and where.startswith("line"):
        with suppress(ValueError):
            item = parse_json(item)
    prompt = item.get("prompt") if isinstance(item, dict) else None
    seed = item.get("seed") if isinstance(item, dict) else None
    whole = seed is None or (type(seed) is int and 0 <= seed < 2**63)
    if not isinstance(prompt, str) or not whole:
        raise ConfigError(
            f'--prompts {path}, {where}: expected an object such as {{"prompt": "a dog", '
            f'"seed": 0}}, found {found}'
        )
    return without_surrogates(prompt), seed
