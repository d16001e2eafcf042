"""Small real stores, whose rows are functions of their keys: any row can be checked anywhere."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from wanlora.commands.inspect.repair import repair
from wanlora.core.buckets import Bucket, latent_shape
from wanlora.core.fingerprint import fingerprint, sha256_text
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.store.commit_records import Segment, read_records
from wanlora.store.index import committed
from wanlora.store.maintenance import Limits
from wanlora.store.reader import StoreReader
from wanlora.store.row_reader import RowReader
from wanlora.store.views import Encoding, View, ViewClip, ViewPrompt, write_view
from wanlora.store.writer import SegmentWriter

BUCKET = Bucket(17, 64, 64)
TEXT_DIM = 32
LIMITS = Limits(32, 2**27)
PROVENANCE = {
    "latents": {
        "kind": "latents",
        "vae_sha256": "ab" * 32,
        "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
        "tf32": False,
    },
    "text": {"kind": "text", "text_encoder_sha256": "cd" * 32, "text_dim": 32},
    "cond_latents": {"kind": "cond_latents", "vae_tensors_sha256": "ef" * 32},
    "clip_vision": {"kind": "clip_vision", "image_encoder_tensors_sha256": "01" * 32},
}
FINGERPRINT = {kind: fingerprint(value) for kind, value in PROVENANCE.items()}


def row_of(kind: Kind, key: str, *, bucket: Bucket = BUCKET, dtype: str = "float16") -> np.ndarray:
    """The one right row of a key: latents [16, F, H, W], or prompt_embeds [L, D]."""
    rng = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()))
    shape = shape_of(kind, bucket)
    length = int(rng.integers(1, 513)) if kind == "text" else shape[0]
    return rng.standard_normal((length, *shape[1:])).astype(dtype)


def shape_of(kind: Kind, bucket: Bucket = BUCKET) -> tuple[int, ...]:
    """Shape of the rows of a kind."""
    others = {"text": (512, TEXT_DIM), "clip_vision": (257, 16)}
    return others.get(kind) or latent_shape(bucket)


def encodings(*kinds: Kind) -> dict[Kind, Encoding]:
    """Encoders of the rows."""
    return {kind: Encoding(FINGERPRINT[kind], PROVENANCE[kind]) for kind in kinds}


def segment_writer(
    cache: Path, kind: Kind, *, bucket: Bucket = BUCKET, dtype: str = "float16", rows: int = 32
) -> SegmentWriter:
    """A writer of rows as `row_of` makes them."""
    return SegmentWriter(
        cache,
        kind=kind,
        provenance=PROVENANCE[kind],
        shape=shape_of(kind, bucket),
        dtype=dtype,
        rows=rows,
        max_bytes=2**27,
        max_seconds=120.0,
    )


def keys_from(first: int) -> list[str]:
    """More keys than a writer writes before it is killed."""
    return [f"{i:064x}" for i in range(first, first + 1000)]


def write_rows(
    cache: Path, kind: Kind, keys: Iterable[str], *, bucket: Bucket = BUCKET, rows: int = 32
) -> None:
    """Write and commit the right rows of these keys."""
    with segment_writer(cache, kind, bucket=bucket, rows=rows) as writer:
        for key in keys:
            writer.add(key, row_of(kind, key, bucket=bucket), source=None)


def open_rows(cache: Path, kind: Kind) -> RowReader:
    """A reader of one kind; a store with nothing committed reads as empty."""
    return RowReader(cache, kind, committed(cache, kind, FINGERPRINT[kind]))


def open_store(cache: Path) -> StoreReader:
    """A reader of latents and prompts."""
    return StoreReader(cache, encodings=encodings("latents", "text"))


def build_store(
    cache: Path,
    *,
    num_clips: int = 6,
    buckets: tuple[Bucket, ...] = (BUCKET,),
    rows: int = 4,
    kinds: tuple[Kind, ...] = ("latents", "text"),
) -> View:
    """Write a store and its view `default`; clip i is of bucket i mod len(buckets)."""
    clips = [
        ViewClip(
            clip_id=f"clip-{i:03d}",
            key=sha256_text(f"clip {i}"),
            bucket=buckets[i % len(buckets)],
            prompts=(sha256_text(f"prompt {i % 4}"),),
            activity=("walking", "running")[i % 2],
            split="val" if i == num_clips - 1 else "train",
            source_group=f"video-{i // 2}",
        )
        for i in range(num_clips)
    ]
    view = View(
        encodings=encodings(*kinds),
        model="micro",
        variant="micro",
        shift=3.0,
        empty_prompt=sha256_text(""),
        negative_prompt=sha256_text("blurry"),
        validation_prompts=(ViewPrompt("a walk", sha256_text("a walk")),),
        clips=tuple(clips),
    )
    write_rows(cache, "text", view.prompt_keys(), rows=rows)
    for bucket in buckets:
        keys = [clip.key for clip in clips if clip.bucket == bucket]
        for kind in kinds:
            if kind != "text":
                write_rows(cache, kind, keys, bucket=bucket, rows=rows)
    return write_view(cache, "default", view)


def segment_folders(cache: Path, kind: Kind) -> list[Path]:
    """Folders of committed segments."""
    return [cache / segment for segment in open_rows(cache, kind).rows.segments]


@contextmanager
def users_folder() -> Iterator[Path]:
    """A folder that every user may reach, as pytest's are not; removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="wanlora-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to read and write everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def segments_of(cache: Location, kind: Kind, fingerprint: str) -> list[Segment]:
    """Commit records of a store without damaged ones, in the order of their ids."""
    segments = list(read_records(cache, kind, fingerprint))
    assert all(isinstance(segment, Segment) for segment in segments)
    return segments


def repair_store(cache: Path) -> dict[str, object]:
    """Repair a store; rows that a view lacks are written as they were."""

    def write_again(_view: View, missing: Mapping[Kind, Collection[str]]) -> int:
        for kind, lacking in missing.items():
            write_rows(cache, kind, sorted(lacking))
        return sum(map(len, missing.values()))

    return repair(cache, LIMITS, write_again)
