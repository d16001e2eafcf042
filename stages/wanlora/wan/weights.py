"""Files of weights in a model folder: the list, the hashes, and the check that all were loaded.

Owns: code that is independent of the model; the encoders and the transformer share it.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wanlora.core import units
from wanlora.core.fingerprint import fingerprint
from wanlora.errors import ModelError

HashFile = Callable[[Path], str]
"""Function that returns the hex sha256 of a file; it may store results by path, size and mtime."""

WEIGHT_NAMES = tuple(
    f"{stem}.safetensors{index}"
    for stem in ("diffusion_pytorch_model", "model")
    for index in (".index.json", "")
)
"""Names that diffusers and transformers look for. Each reads its own stem only."""

_CHUNK_BYTES = 1 << 22


def weight_files(part: Path) -> list[Path]:
    """List the weight files that `from_pretrained` reads from a sub-folder, sorted by name.

    Raises:
        ModelError: There are none, or more than one set of them.
    """
    found = [name for name in WEIGHT_NAMES if (part / name).is_file()]
    if len(found) > 1:
        raise ModelError(
            f"{part} holds {' and '.join(found)}, and the libraries do not agree on the one to "
            "load (transformers prefers a single file, diffusers the index): delete the one that "
            "does not belong to this model, or download the folder again"
        )
    if not found:
        raise ModelError(f"{part} holds no .safetensors weights")
    if found[0].endswith(".index.json"):
        shards = set(read_json(part / found[0])["weight_map"].values())
        return [part / name for name in sorted(shards)]
    return [part / found[0]]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; the error names a file that is not one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}; expected an object")
    return value


def check_loading(info: Mapping[str, Any], part: Path) -> None:
    """Refuse a model whose weights did not all load; the libraries only warn.

    Args:
        info: Second result of `from_pretrained(..., output_loading_info=True)`.
        part: The sub-folder it was loaded from.

    Raises:
        ModelError: Weights are missing, left over or of another shape; names the first few.
    """
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    found = {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}
    problems = [f"{len(names)} {kind}: {units.names(names)}" for kind, names in found.items()]
    if problems:
        raise ModelError(
            f"the weights in {part} do not fit their configuration: {'; '.join(problems)}; "
            "download the folder again"
        )


def weights_sha256(part: Path, hash_file: HashFile | None = None) -> str:
    """Name a sub-folder's weights: the file's sha256, or that of the shards' digests in order."""
    digests = [(hash_file or file_sha256)(file) for file in weight_files(part)]
    return digests[0] if len(digests) == 1 else fingerprint(digests)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, streamed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hide_bars_without_terminal() -> None:
    """Keep the libraries' loading bars out of logs and pipes."""
    if sys.stderr.isatty():
        return
    import diffusers.utils.logging  # noqa: PLC0415  (this file is used before any model is)
    import transformers.utils.logging  # noqa: PLC0415

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
