"""Identity of the encoders: digests of the tensors and token ids that decide their output.

Owns: the recipe of these digests, and their storage by path, size and mtime. Two folders with equal
tensors have the same identity, even if their shards, file names or stored types differ. Must not be
imported by training.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from wanlora.core.fingerprint import fingerprint
from wanlora.errors import ModelError
from wanlora.wan.weights import weight_files

RECIPE = 2
"""Revision of the digests; 1 (release 0.1.0) hashed the files. It enters the provenances."""

Memo = MutableMapping[str, tuple[str, str]]
"""(stamp of the files, digest), by name of the digest."""

Tokenize = Callable[[Any, Sequence[str]], list[list[int]]]
"""Tokenizer and prompts to token ids, as the text encoder receives them."""

_PIECE_VALUES = 1 << 22
"""Values hashed at a time: 16 MiB of float32. Part of the recipe."""

_THREADS = min(8, os.cpu_count() or 1)

_VAE_USED = ("encoder.", "quant_conv.")
"""Prefixes of the tensors that latents depend on: the VAE's decoder is not among them."""

_CLIP_USED = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.",
    "embeddings.position_embedding.",
    "pre_layrnorm.",
)
"""Prefixes of the tensors before CLIP's layers. Old files also have constant position_ids."""

_TIED = {"encoder.embed_tokens.weight": "shared.weight"}
"""UMT5's embedding has two names. A file has either, or both with equal values."""

_PREFIX = "vision_model."
"""Prefix of the names of CLIP's tensors in the files of some releases of transformers."""

_CHARACTERS = (*range(0x20, 0xD800), *range(0xE000, 0x10000), *range(0x1F300, 0x1FB00))
_ORDINARY = (
    "", "a person walking", "Fünf Boxkämpfer, 12 km/h!", "跑步的人", "a red ball " * 300,
)  # fmt: skip
"""Texts without special tokens; the last has more than 512 tokens."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive rows of a tensor in a file; `name` is the module's, `key` the file's."""

    name: str
    shape: tuple[int, ...]
    file: Path
    key: str
    rows: slice | None


def vae_sha256(folder: Path, dtype: torch.dtype, memo: Memo) -> str:
    """Digest of the tensors of `vae/` that latents depend on, in the compute type.

    Args:
        folder: Model folder that holds `vae/`.
        dtype: Compute type of the VAE.
        memo: Digests from before; this one is added.

    Raises:
        ModelError: A file is missing or damaged.
    """
    return _tensors_sha256(folder / "vae", dtype, memo, _VAE_USED)


def text_encoder_sha256(folder: Path, dtype: torch.dtype, memo: Memo) -> str:
    """Digest of the tensors of `text_encoder/` in the compute type; see `vae_sha256`.

    Raises:
        ModelError: A file is missing or damaged, or the two names of the embedding differ.
    """
    return _tensors_sha256(folder / "text_encoder", dtype, memo, ("",))


def image_encoder_sha256(folder: Path, num_layers: int, dtype: torch.dtype, memo: Memo) -> str:
    """Digest of the tensors of `image_encoder/` that embeddings depend on; see `vae_sha256`.

    The transformer reads the output of the last layer but one, so the last layer, the final norm
    and the projection are not among them.

    Args:
        folder: Model folder that holds `image_encoder/`.
        num_layers: Number of layers of the encoder.
        dtype: Compute type of the encoder.
        memo: Digests from before; this one is added.

    Raises:
        ModelError: A file is missing or damaged.
    """
    layers = tuple(f"encoder.layers.{i}." for i in range(num_layers - 1))
    return _tensors_sha256(folder / "image_encoder", dtype, memo, (*_CLIP_USED, *layers))


def tokenizer_sha256(folder: Path, load: Callable[[], Any], tokenize: Tokenize, memo: Memo) -> str:
    """Digest of the loaded tokenizer's behaviour: its vocabulary with scores, and ids of probes.

    Covers every setting that changes ids, in all of its files: a line of 64 characters for
    each part of Unicode's basic plane, and ordinary texts, pass through the call that encodes
    prompts.

    Args:
        folder: Model folder that holds `tokenizer/`.
        load: Loads the tokenizer; called unless the digest is in `memo`.
        tokenize: `encoders.tokenize`.
        memo: Digests from before; this one is added.
    """
    part = folder / "tokenizer"
    files = sorted(file for file in part.iterdir() if file.is_file())
    versions = f"{transformers.__version__} {tokenizers.__version__}"

    def digest() -> str:
        tokenizer = load()
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        vocabulary = {name: model.get(name) for name in ("type", "vocab", "merges")}
        return fingerprint([vocabulary, tokenize(tokenizer, [*_ORDINARY, *_lines(64)])])

    return _remembered(f"{RECIPE} {versions} {part.resolve()}", files, memo, digest)


def is_plain(folder: Path, load: Callable[[], Any], tokenize: Tokenize) -> bool:
    """Test whether the loaded tokenizer gives the ids of tokenizer.json alone for ordinary texts.

    Release 0.1.0 recorded the hash of that file, and of no other setting.
    """
    file = folder / "tokenizer" / "tokenizer.json"
    if not file.is_file():
        return True  # spiece.model, hashed in its place
    ids = tokenize(load(), _ORDINARY)
    alone = tokenizers.Tokenizer.from_file(str(file))
    alone.enable_truncation(len(ids[0]))
    alone.enable_padding(length=len(ids[0]))  # with id 0, as T5's
    return [encoding.ids for encoding in alone.encode_batch(list(_ORDINARY))] == ids


def parse_memo(document: bytes | None) -> Memo:
    """Digests that `memo_document` wrote; none if there is no document or it is damaged."""
    try:
        entries = json.loads(document or b"{}")
        return {name: (str(stamp), str(digest)) for name, (stamp, digest) in entries.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def memo_document(memo: Memo) -> bytes:
    """Digests for the next run, as a file."""
    return json.dumps(dict(memo), sort_keys=True, indent=0).encode()


def _lines(length: int) -> list[str]:
    return [
        "".join(map(chr, _CHARACTERS[i : i + length])) for i in range(0, len(_CHARACTERS), length)
    ]


def _tensors_sha256(part: Path, dtype: torch.dtype, memo: Memo, used: tuple[str, ...]) -> str:
    files = weight_files(part)

    def digest() -> str:
        try:
            pieces = list(_pieces(files, used))
            if not pieces:
                raise ModelError(f"{part} has no weights named {used[0]}*: download it again")
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash") as pool:
                digests = list(pool.map(lambda piece: _piece_sha256(piece, dtype), pieces))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read the weights in {part}: {error}") from error
        return fingerprint(_merged(part, pieces, digests))

    return _remembered(f"{RECIPE} {dtype} {part.resolve()}", files, memo, digest)


def _pieces(files: Iterable[Path], used: tuple[str, ...]) -> Iterator[_Piece]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                name = _TIED.get(key, key).removeprefix(_PREFIX)
                if name.startswith(used):
                    shape = tuple(tensors.get_slice(key).get_shape())
                    for rows in _row_ranges(shape):
                        yield _Piece(name, shape, file, key, rows)


def _row_ranges(shape: tuple[int, ...]) -> list[slice | None]:
    """Ranges of rows that depend on nothing but the shape."""
    if not shape:
        return [None]
    rows = max(1, _PIECE_VALUES // max(1, prod(shape[1:])))
    return [slice(start, start + rows) for start in range(0, max(1, shape[0]), rows)]


def _piece_sha256(piece: _Piece, dtype: torch.dtype) -> str:
    """Hash values as the module computes with them; copies one piece into memory."""
    with safe_open(piece.file, framework="pt") as tensors:
        if piece.rows is None:
            values = tensors.get_tensor(piece.key)
        else:
            values = tensors.get_slice(piece.key)[piece.rows]
    raw = values.to(dtype).contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy()).hexdigest()


def _merged(part: Path, pieces: Sequence[_Piece], digests: Sequence[str]) -> dict[str, Any]:
    """Shape and digests by the tensor's name, the files left out.

    Raises:
        ModelError: Two tensors of one name differ.
    """
    found: dict[tuple[Path, str], tuple[str, tuple[int, ...], list[str]]] = {}
    for piece, digest in zip(pieces, digests, strict=True):
        found.setdefault((piece.file, piece.key), (piece.name, piece.shape, []))[2].append(digest)
    merged: dict[str, Any] = {}
    for (file, key), (name, shape, own) in found.items():
        if merged.setdefault(name, [list(shape), own]) != [list(shape), own]:
            raise ModelError(
                f"{part} holds two different tensors for {name}; the second is {key} in "
                f"{file.name}: download the folder again"
            )
    return merged


def _remembered(name: str, files: Sequence[Path], memo: Memo, make: Callable[[], str]) -> str:
    """Return the digest of files that have the sizes and times they had, or make it."""
    stamp = _stamp(files)
    known = memo.get(name)
    if known is None or known[0] != stamp:
        memo[name] = (stamp, make())
    return memo[name][1]


def stamp(part: Path) -> str:
    """Hash of the sizes and times of the files in a sub-folder; it changes if a file is replaced.

    Raises:
        ModelError: A file cannot be read.
    """
    return _stamp(sorted(file for file in part.iterdir() if file.is_file()))


def _stamp(files: Sequence[Path]) -> str:
    try:
        stats = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise ModelError(f"cannot read the model's files: {error}") from None
    return fingerprint([[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats])
