"""Paths and URLs as a user writes them: a folder of this machine, or an object store.

Owns: reading both from text, the refusal of what is neither, `location / "key"` for both, and the
user's cache folder. Opens nothing.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import platformdirs

CACHE_HOME = "WANLORA_CACHE_HOME"
"""Environment variable: a folder to use instead of the user's cache folder."""

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/+)(?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Url:
    """An address such as s3://bucket/prefix, without a slash at the end."""

    address: str

    def __truediv__(self, key: str) -> "Url":
        return Url(f"{self.address}/{key}")

    def __str__(self) -> str:
        return self.address


Location = Path | Url


def parse(value: str | Path | Url) -> Location:
    """Read a path or URL; file:///folder is that folder, and ~ is the user's home.

    Raises:
        ValueError: A URL without a bucket or with another number of slashes; or see `parse_path`.
    """
    if isinstance(value, Url):
        return value
    found = _URL.fullmatch(str(value))
    if found is None:
        return parse_path(value)
    scheme, slashes, rest = found["scheme"], found["slashes"], found["rest"]
    expected = "///" if scheme == "file" else "//"
    if slashes != expected and not (scheme == "memory" and not rest):
        raise ValueError(f"{value} is not a URL; write {scheme}:{expected}{rest}")
    if scheme == "file":
        return Path(unquote(urlsplit(str(value)).path))
    if not rest.strip("/") and scheme != "memory":
        raise ValueError(f"{value} names no bucket; expected for example s3://bucket/prefix")
    return Url(f"{scheme}://{rest.rstrip('/')}")


def parse_path(value: str | Path) -> Path:
    """Read a path of this machine; ~ is the user's home.

    Raises:
        ValueError: It is a URL, which would become a folder named after the scheme; or it names
            the home of an unknown user.
    """
    text = str(value)
    if _URL.fullmatch(text):
        raise ValueError(f"{text} is a URL; expected a path on this machine")
    path = Path(text)
    if not str(path).startswith("~"):
        return path
    if text.startswith("."):  # absolute, because "./~" and "~" are equal as paths
        return path.absolute()
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(
            f"{text}: no such user; for a name that starts with ~, write ./{text}"
        ) from None


def cache_home() -> Path:
    """Folder for what this project builds for itself: $WANLORA_CACHE_HOME, or the user's cache."""
    folder = os.environ.get(CACHE_HOME)
    return Path(folder).expanduser() if folder else platformdirs.user_cache_path("wanlora")


def prompt_home() -> Path:
    """Folder of this user's own store of preview prompts, for caches that cannot be written."""
    return cache_home() / "prompts"
