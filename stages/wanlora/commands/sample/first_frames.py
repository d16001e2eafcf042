"""First frames of the videos of an image-to-video model: image files, or frames of cached clips.

Owns: the source of a first frame, and its fields in the record of a video. Must not import torch:
`pixels` reads them.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from wanlora.core.location import Location
from wanlora.data.captions.folders import VIDEO_SUFFIXES
from wanlora.errors import ConfigError, MediaError
from wanlora.media import image
from wanlora.media.source import source_sha256
from wanlora.store.views import View, ViewClip


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file that a video starts from.

    Attributes:
        path: The file.
        sha256: Hash of its bytes.
        where: Flag or line that names it, for messages.
    """

    path: Path
    sha256: str
    where: str

    @property
    def name(self) -> str:
        """Name for people."""
        return str(self.path)

    @property
    def key(self) -> str:
        """Name of its pixels."""
        return self.sha256

    @property
    def record(self) -> dict[str, str]:
        """Fields of the record of a video."""
        return {"path": str(self.path), "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class ClipFrame:
    """The first frame of a cached clip, as the VAE decodes it from the latents.

    Attributes:
        cache: The cache.
        view: View of the clip.
        clip: The clip.
    """

    cache: Location
    view: View
    clip: ViewClip

    @property
    def name(self) -> str:
        """Name for people."""
        return f"of {self.clip.split} clip {self.clip.clip_id}"

    @property
    def key(self) -> str:
        """Name of its pixels."""
        return self.clip.key

    @property
    def record(self) -> dict[str, str]:
        """Fields of the record of a video."""
        return {
            "clip": self.clip.clip_id,
            "key": self.clip.key,
            "latents": self.view.fingerprint("latents"),
        }


FirstFrame: TypeAlias = ImageFile | ClipFrame


def read_file(path: Path, *, where: str) -> ImageFile:
    """Check an image file, all of it, and hash it.

    Args:
        path: The file.
        where: Flag or line that names it, for messages.

    Raises:
        ConfigError: It is missing, damaged, too large, or not a still image.
    """
    if path.suffix.lower() in VIDEO_SUFFIXES:
        raise ConfigError(
            f"{where} {path} is a video; expected an image, such as its first frame: "
            f"ffmpeg -i {shlex.quote(str(path))} -frames:v 1 first-frame.png"
        )
    try:
        image.read_checked(path)
        return ImageFile(path, source_sha256(path), where)
    except MediaError as error:
        expected = "" if error.code == "missing" else "; expected a still image (PNG, JPEG, WebP)"
        raise ConfigError(f"{where} {error}{expected}") from None
