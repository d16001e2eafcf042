"""The prompts of `sample`, each with its seeds and its first frame: of the flags, a file, a cache.

Owns: the format of a file of prompts. Must not know: the files of the videos.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from wanlora.commands.sample.first_frames import ClipFrame, FirstFrame, read_file
from wanlora.config import ACTIVITY
from wanlora.core.location import Location
from wanlora.core.prompts import assign_prompts
from wanlora.core.text import decode_utf8, parse_json, shorten, without_surrogates
from wanlora.data.source_paths import source_path
from wanlora.errors import ConfigError
from wanlora.store.views import View


class Request(NamedTuple):
    """A video to make, as the command line describes it.

    Attributes:
        activity: Its activity; empty without a cache.
        prompt: Its prompt.
        seed: Its seed.
        image: Its first frame.
    """

    activity: str
    prompt: str
    seed: int
    image: FirstFrame | None = None


class FilePrompt(NamedTuple):
    """A prompt of a file; its seed and the path of its image are None if the file has none."""

    prompt: str
    seed: int | None = None
    image: Path | None = None


def repeat(prompt: str, num_videos: int, *, seed: int, activity: str = "") -> list[Request]:
    """Assign one prompt to `num_videos` videos, with seeds seed, seed + 1, ..."""
    return [Request(activity, prompt, seed + index) for index in range(num_videos)]


def of_file(path: Path, num_videos: int, *, seed: int) -> list[Request]:
    """Assign the prompts of a file, each from its own seed and image if it has them.

    Raises:
        ConfigError: See `read_prompts`; or an image cannot be used.
    """
    lines = read_prompts(path)
    files = dict.fromkeys(line.image for line in lines if line.image)
    images = {file: read_file(file, where=f"--prompts {path}: image") for file in files}
    return [
        item._replace(image=images[line.image] if line.image else None)
        for line in lines
        for item in repeat(line.prompt, num_videos, seed=seed if line.seed is None else line.seed)
    ]


def of_templates(
    templates: Sequence[str], view: View, split: str, num_videos: int, *, cache: Location, seed: int
) -> list[Request]:
    """Assign each template to every activity of a view, whose name replaces `{activity}`.

    The first frames are those of the activity's clips of the split, in turn.

    Raises:
        ConfigError: The clips of the view have no activities.
    """
    activities = sorted({clip.activity for clip in view.clips} - {""})
    if not activities:
        raise ConfigError(
            f"the clips of view {view.name!r} of {cache} have no activities to replace {ACTIVITY}: "
            "leave out --cache or --prompt"
        )
    requests = [
        item
        for template in templates
        for name in activities
        for item in repeat(template.replace(ACTIVITY, name), num_videos, seed=seed, activity=name)
    ]
    return _with_clips(requests, [None] * len(requests), cache=cache, view=view, split=split)


def of_captions(
    cache: Location, view: View, split: str, num_videos: int, *, seed: int
) -> list[Request]:
    """Assign captions of the clips of a split, `num_videos` for each activity.

    The first frame of a caption is that of its clip.

    Raises:
        StoreError: The split has no clips, or a caption is missing in the store.
    """
    from wanlora.store.captions import captions  # noqa: PLC0415  (imports zarr)
    from wanlora.store.reader import StoreReader  # noqa: PLC0415

    reader = StoreReader.of_view(cache, view)
    keys = captions(reader, view, split)
    items = assign_prompts(
        {name: list(texts) for name, texts in keys.items()}, num_videos, seed=seed
    )
    requests = [Request(*item) for item in items]
    captions_of_items = [keys[item.activity][item.prompt] for item in items]
    return _with_clips(requests, captions_of_items, cache=cache, view=view, split=split)


def _with_clips(
    requests: Sequence[Request],
    keys: Sequence[str | None],
    *,
    cache: Location,
    view: View,
    split: str,
) -> list[Request]:
    """Add the first frame of a clip to each request: of one with the caption of the key."""
    from wanlora.store.captions import clips_of  # noqa: PLC0415  (imports zarr)

    wanted = [(item.activity, key) for item, key in zip(requests, keys, strict=True)]
    return [
        item._replace(image=ClipFrame(cache, view, clip))
        for item, clip in zip(requests, clips_of(view, split, wanted), strict=True)
    ]


def read_prompts(path: Path) -> list[FilePrompt]:
    """Read a file of prompts: lines of text, or JSON objects with `prompt`.

    An object may also have `seed`, and `image`, whose path is relative to the file's folder. Blank
    lines are skipped, in a text file also lines that start with `#`. A .json file may hold one
    list.

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
    return [FilePrompt(_of_text(path, where, str(item))) for where, item in items]


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
            "--steps, --guidance-scale); a .jsonl file may give each prompt its seed and image: "
            '{"prompt": "a dog", "seed": 0, "image": "dog.png"}'
        )
    return line


def _of_json(path: Path, where: str, item: Any) -> FilePrompt:
    found = shorten(item) if isinstance(item, str) else f"{item!r:.80}"
    if isinstance(item, str) and where.startswith("line"):
        with suppress(ValueError):
            item = parse_json(item)
    values = item if isinstance(item, dict) else {}
    prompt, seed, file = (values.get(name) for name in ("prompt", "seed", "image"))
    whole = seed is None or (type(seed) is int and 0 <= seed < 2**63)
    named = file is None or (isinstance(file, str) and file)
    if not isinstance(prompt, str) or not whole or not named:
        raise ConfigError(
            f'--prompts {path}, {where}: expected an object such as {{"prompt": "a dog", '
            f'"seed": 0, "image": "dog.png"}} (seed and image may be left out), found {found}'
        )
    image = source_path(file, path.parent) if file else None
    return FilePrompt(without_surrogates(prompt), seed, image)
