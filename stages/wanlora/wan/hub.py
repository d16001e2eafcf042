"""The model hub: the size of a download before it starts, and the upload of a folder.

Owns: requests to the hub. Must not know: variants, torch.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanlora.core.units import count, size
from wanlora.errors import ModelError, OutputError

MARGIN = 1.1
"""Required free disk per byte to download: temporary files and file systems need some."""

log = logging.getLogger(__name__)


def check_room(model: str, patterns: Sequence[str]) -> int:
    """Print the size of the remaining download, and refuse a disk that cannot hold it.

    Returns:
        Bytes to download; 0 if everything is there, or if the hub does not answer (the download
        then reports the reason).

    Raises:
        ModelError: The disk has too little room; names the missing bytes and the folder.
    """
    import huggingface_hub  # noqa: PLC0415  (a second to import, and only hub ids need it)
    from huggingface_hub import constants  # noqa: PLC0415
    from huggingface_hub.errors import DryRunError  # noqa: PLC0415

    unknown: tuple[type[Exception], ...] = (DryRunError, *network_errors())
    try:
        files: Any = huggingface_hub.snapshot_download(
            model, allow_patterns=list(patterns), dry_run=True
        )
    except unknown:
        return 0
    num_bytes: int = sum(file.file_size or 0 for file in files if file.will_download)
    if not num_bytes:
        return 0
    place = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    log.info(
        "downloading %s of %s (%s) to %s, which has %s free",
        size(num_bytes), model, ", ".join(sorted(_sizes(files))), place, size(free),
    )  # fmt: skip
    if free < MARGIN * num_bytes:
        raise ModelError(
            f"{model} needs a download of {size(num_bytes)} to {place}, and that disk has "
            f"{size(free)} free (expected {MARGIN:g} times the download); free some, or set "
            "HF_HOME to a folder on a larger disk"
        )
    return num_bytes


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder's files to a model repository in one commit, and return its address.

    The repository is made if it is missing. Files it has under other names stay.

    Args:
        folder: Folder with only the files to publish.
        repository: USER/NAME.
        private: True to make a new repository private.

    Raises:
        OutputError: There is no access, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  (as above)
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415

    files = sorted(file for file in folder.rglob("*") if file.is_file())
    num_bytes = sum(file.stat().st_size for file in files)
    log.info("uploading %s, %s, to %s", count(len(files), "file"), size(num_bytes), repository)
    api = HfApi(library_name="wanlora")
    unreachable: tuple[type[Exception], ...] = (OfflineModeIsEnabled, *network_errors())
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a LoRA adapter"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise OutputError(
                f"no access to {repository} ({status}): log in with a write token "
                "(hf auth login), and use a name of your own, USER/NAME"
            ) from None
        raise OutputError(f"the hub did not take {repository}: {_first_line(error)}") from None
    except unreachable as error:
        raise OutputError(
            f"{repository} was not uploaded, because the hub cannot be reached "
            f"({_first_line(error)}); run the same command again"
        ) from None
    return str(address)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def network_errors() -> tuple[type[Exception], ...]:
    """Exceptions of a request to the hub when the network, the hub or the disk fails.

    A timeout is an error class of the installed HTTP client, not an OSError; the hub's class of
    errors derives from both. A transfer by Xet fails with a RuntimeError.
    """
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415  (as above)

    return (*HfHubHTTPError.__bases__, OSError, RuntimeError)


def _sizes(files: Sequence[Any]) -> list[str]:
    """Name and size of each part of the model."""
    parts: dict[str, int] = {}
    for file in files:
        if file.will_download:
            part = file.filename.split("/")[0] if "/" in file.filename else "index"
            parts[part] = parts.get(part, 0) + (file.file_size or 0)
    return [f"{part} {size(num_bytes)}" for part, num_bytes in parts.items()]
