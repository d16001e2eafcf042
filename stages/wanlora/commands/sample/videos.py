"""Videos that `sample` makes: their files and records, and those that exist already.

Owns: the names of the files, and the check that no file is replaced without `--overwrite`.
Must not know: the source of prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora.commands.sample.first_frames import FirstFrame
from wanlora.commands.sample.prompts import Request
from wanlora.core import units
from wanlora.core.fingerprint import difference
from wanlora.core.prompts import slug
from wanlora.errors import ConfigError
from wanlora.files import require_folder
from wanlora.media.recorded import record_beside, record_path

NOT_SETTINGS = frozenset({"versions", "device"})
"""Fields of a record that may differ in a video that is kept: another release, another device."""


@dataclass(frozen=True, slots=True)
class Video:
    """One video to make: its prompt, its seed, its file, and its first frame if it has one."""

    prompt: str
    seed: int
    path: Path
    image: FirstFrame | None = None


def in_folder(wanted: Sequence[Request], folder: Path, suffix: str) -> list[Video]:
    """Name a file for each prompt; an activity has its own sub-folder.

    Raises:
        OutputError: A folder cannot be written.
    """
    videos = []
    for number, item in enumerate(wanted):
        place = folder / slug(item.activity) if item.activity else folder
        name = f"{number:03d}-{slug(item.prompt)}-seed{item.seed}.{suffix}"
        videos.append(Video(item.prompt, item.seed, place / name, item.image))
    for place in {video.path.parent for video in videos}:
        require_folder(place, flag="--output-dir")
    return videos


def as_file(wanted: Sequence[Request], path: Path, suffix: str) -> list[Video]:
    """Give the only video the name of a file.

    Raises:
        ConfigError: There are several videos, or the name has another suffix.
        OutputError: The folder of the file cannot be written.
    """
    if len(wanted) > 1:
        raise ConfigError(
            f"--output {path} names one file for {len(wanted)} videos; use --output-dir"
        )
    if path.suffix.lower() != f".{suffix}":
        raise ConfigError(f"--output {path}: expected a name ending in .{suffix}")
    require_folder(path.parent, flag="--output")
    return [Video(wanted[0].prompt, wanted[0].seed, path, wanted[0].image)]


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
    """Select the videos that do not exist; existing ones must have been made the same way.

    Raises:
        ConfigError: A video that exists was made with other settings, or has no record of them.
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
    """Record of a video, for the JSON file beside it."""
    image = {"image": video.image.record} if video.image else {}
    return {**made_with, "prompt": video.prompt, "seed": video.seed, **image}


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in record.items() if key not in NOT_SETTINGS}
    adapters = settings.get("adapters")
    if isinstance(adapters, list):  # each field of an adapter is compared and named
        settings["adapters"] = {str(number): item for number, item in enumerate(adapters)}
    return settings
