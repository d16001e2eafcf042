"""The whole error tree. A user's mistake is one of these and is shown without a traceback.

A message names the thing and what happened to it, the expected and the found value, and the command
or setting that fixes it.
"""

from typing import ClassVar


class WanloraError(Exception):
    """A refusal with an explanation: the command line prints the message and exits with 1."""

    exit_code: ClassVar[int] = 1


class ConfigError(WanloraError):
    """A setting is unknown, out of range, or contradicts another (exit 2: usage)."""

    exit_code: ClassVar[int] = 2


class DeviceError(WanloraError):
    """The selected device is missing, or is too slow for the model."""


class OutputError(WanloraError):
    """A result cannot be written to the given path."""


class ManifestError(WanloraError):
    """A manifest or caption file cannot be used as it is."""


class NoCaptionError(ManifestError):
    """No source has a caption."""


class MediaError(WanloraError):
    """One source file or clip cannot be used. `code` is one of `MEDIA_ERROR_CODES`."""

    def __init__(self, code: str, message: str) -> None:
        assert code in MEDIA_ERROR_CODES, code
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["MediaError"], tuple[str, str]]:
        """Support pickling, for an error that a decode process returns."""
        return type(self), (self.code, str(self))


class PassingError(MediaError):
    """A cause outside the file stopped its reading; another run may succeed."""


class LostProcessError(PassingError):
    """The process that held a file died or hung."""


MEDIA_ERROR_CODES = frozenset(
    {
        "missing", "unreadable", "changed", "no_video", "truncated", "too_short", "low_fps",
        "corrupt_at",
        "hdr", "bad_npz", "bad_size", "bad_line", "no_caption", "caption_truncated",
    }
)  # fmt: skip


class StoreError(WanloraError):
    """The latent store cannot be used."""


class StoreVersionError(StoreError):
    """The store has a format version that this release does not support."""


class StaleStoreError(StoreError):
    """The store holds encodings made with other weights or settings than the selected ones."""


class MissingRowsError(StoreError):
    """Clips or prompts named by a view are not in the store."""


class CorruptRowError(StoreError):
    """A stored row does not match its checksum, or its object has vanished."""


class WorkerError(WanloraError):
    """The processes that encode have ended before their work was done."""


class ModelError(WanloraError):
    """A model folder is missing, incomplete, of an unknown kind, or holds wrong weights."""


class AdapterError(WanloraError):
    """An adapter cannot be made for, or loaded into, this transformer."""


class RunError(WanloraError):
    """A run folder cannot be started, continued or written."""


class LostRankError(RunError):
    """Another process of the run ended, or does not answer."""


class CheckpointError(RunError):
    """A checkpoint is incomplete or belongs to another run."""


class NonFiniteError(WanloraError):
    """A loss or gradient is NaN or infinite; nothing was saved from that step."""
