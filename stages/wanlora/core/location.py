"""Where a cache is kept: a folder of this machine, or a URL of an object store.

Owns: telling the two apart, and writing both the same way (`location / "key"`). Opens nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit


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
    """Read a `--cache` value; file:///folder is that folder.

    Raises:
        ValueError: A URL without a bucket.
    """
    if isinstance(value, Path | Url):
        return value
    scheme, separator, rest = value.partition("://")
    if not separator:
        return Path(value)
    if scheme == "file":
        return Path(unquote(urlsplit(value).path))
    if not rest.strip("/") and scheme != "memory":
        raise ValueError(f"{value} names no bucket; expected for example s3://bucket/prefix")
    return Url(f"{scheme}://{rest.rstrip('/')}")
