"""Which videos `sample` makes: their prompts, their seeds, what they are called, and what is there.

Owns: where prompts come from, and that no file is replaced unasked.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora.config import ACTIVITY, SampleConfig
from wanlora.core import units
from wanlora.core.fingerprint import difference
from wanlora.core.prompts import PromptAssignment, assign_prompts, slug
from wanlora.core.text import decode_utf8, parse_json, shorten, without_surrogates
from wanlora.errors import ConfigError
from wanlora.files import require_folder
from wanlora.media.recorded import record_beside, record_path
from wanlora.store.views import read_view

# Of a record, what may differ in a video that is kept: another release made it, or another device.
NOT_SETTINGS = frozenset({"versions", "device"})


@dataclass(frozen=True, slots=True)
class Video:
    """One video to make: its prompt, its seed, its file."""

    prompt: str
    seed: int
    path: Path


def plan(config: SampleConfig) -> list[Video]:
    """List the videos: `num_videos` for each prompt, with seeds seed, seed + 1, ...

    Raises:
        ConfigError: The prompts cannot be read, a file exists and may not be replaced, or one name
            stands for many videos.
        StoreError: The cache has no such view or split.
        OutputError: The folder cannot be written.
    """
    wanted = _wanted(config)
    if config.output is None:
        videos = [
            Video(item.prompt, item.seed, _path(config, number, item))
            for number, item in enumerate(wanted)
        ]
    else:
        if len(wanted) > 1:
            raise ConfigError(
                f"--output {config.output} names one file for {len(wanted)} videos; use "
                "--output-dir"
            )
        if config.output.suffix.lower() != f".{config.format}":
            raise ConfigError(
                f"--output {config.output}: expected a name ending in .{config.format}"
            )
        videos = [Video(wanted[0].prompt, wanted[0].seed, path=config.output)]
    flag = "--output" if config.output is not None else "--output-dir"
    for folder in {video.path.parent for video in videos}:
        require_folder(folder, flag=flag)
    if not config.skip_existing:
        check_new(videos, overwrite=config.overwrite)
    return videos


def _path(config: SampleConfig, number: int, item: PromptAssignment) -> Path:
    name = f"{number:03d}-{slug(item.prompt)}-seed{item.seed}.{config.format}"
    folder = config.output_dir / slug(item.activity) if item.activity else config.output_dir
    return folder / name


def _wanted(config: SampleConfig) -> list[PromptAssignment]:
    """Prompts of the flags, of the file and of the cache, each with its seeds."""
    seeds = range(config.seed, config.seed + config.num_videos)
    wanted = []
    if config.cache is not None:
        wanted += _of_activities(config)
    else:
        wanted += [PromptAssignment("", prompt, seed) for prompt in config.prompt for seed in seeds]
    if config.prompts is not None:
        for prompt, seed in read_prompts(config.prompts):
            first = config.seed if seed is None else seed
            wanted += [
                PromptAssignment("", prompt, first + index) for index in range(config.num_videos)
            ]
    return wanted


def _of_activities(config: SampleConfig) -> list[PromptAssignment]:
    """Videos of every activity of a cache: of a template, or of its captions."""
    assert config.cache is not None
    view = read_view(config.cache, config.view)
    if config.prompt:
        activities = sorted({clip.activity for clip in view.clips} - {""})
        if not activities:
            raise ConfigError(
                f"the clips of view {config.view!r} of {config.cache} have no activities for "
                f"{ACTIVITY} to stand for: leave out --cache or --prompt"
            )
        return [
            item
            for prompt in config.prompt
            for item in assign_prompts(
                {name: [prompt.replace(ACTIVITY, name)] for name in activities},
                config.num_videos,
                seed=config.seed,
            )
        ]
    from wanlora.store.captions import captions  # noqa: PLC0415  (imports zarr)
    from wanlora.store.reader import StoreReader  # noqa: PLC0415

    reader = StoreReader.of_view(config.cache, view)
    known = {name: list(texts) for name, texts in captions(reader, view, config.split).items()}
    return assign_prompts(known, config.num_videos, seed=config.seed)


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
    """Split a file into (`line 3`, item)."""
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


def check_new(videos: Sequence[Video], *, overwrite: bool) -> None:
    """Refuse to replace a video or its record unasked.

    Raises:
        ConfigError: Names the first few.
    """
    files = [file for video in videos for file in (video.path, record_path(video.path))]
    existing = [str(file) for file in files if file.exists()]
    if existing and not overwrite:
        raise ConfigError(
            f"{units.names(existing)} would be replaced; pass --overwrite, or "
            "--skip-existing to make only those that are missing, or another --output-dir"
        )


def missing(videos: Sequence[Video], made_with: Mapping[str, Any]) -> list[Video]:
    """Which videos are still to be made; those that are there must be of the same settings.

    Raises:
        ConfigError: One that exists was made with others, or does not say with which.
    """
    return [video for video in videos if not _is_there(video, made_with)]


def _is_there(video: Video, made_with: Mapping[str, Any]) -> bool:
    if not video.path.exists() and not record_path(video.path).exists():
        return False
    found, wanted = record_beside(video.path), record_of(video, made_with)
    differing = (
        ["it has no record beside it"]
        if found is None
        else difference(_settings(found), _settings(wanted))
    )
    if differing:
        there = video.path if video.path.exists() else record_path(video.path)
        raise ConfigError(
            f"{there} exists and is not what this command makes:\n  "
            + "\n  ".join(differing)
            + "\npass --overwrite, or another --output-dir"
        )
    return video.path.exists()  # a kill may have left the record alone


def record_of(video: Video, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the JSON beside a video."""
    return {**made_with, "prompt": video.prompt, "seed": video.seed}


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in record.items() if key not in NOT_SETTINGS}
    adapters = settings.get("adapters")
    if isinstance(adapters, list):  # each field of an adapter is compared and named
        settings["adapters"] = {str(number): item for number, item in enumerate(adapters)}
    return settings
