"""A store of any number of clips without its rows: commit records as the real writer makes them.

One segment of each kind is written by `SegmentWriter`, with what stage one records beside rows; the
others are that record under other keys. Shards are left out, so nothing can be read of a row. View
and records are those of 81x480x832 clips, three sizes, one caption each.
"""

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from wanlora.core.buckets import Bucket, latent_shape
from wanlora.core.fingerprint import fingerprint
from wanlora.store import schema
from wanlora.store.commit_records import read_records
from wanlora.store.groups import write_groups
from wanlora.store.views import Encoding, View, ViewClip
from wanlora.store.writer import SegmentWriter
from wanlora.wan.variants import VARIANTS

ROWS = 32
BUCKETS = (Bucket(81, 480, 832), Bucket(81, 832, 480), Bucket(81, 624, 624))
ACTIVITIES = 400
TEXT_SHAPE = (512, 4096)
CAPTION = (
    "A person in a grey jacket walks along a wet street in the evening, past parked cars and lit "
    "shop windows; the camera follows at shoulder height, slightly shaking, while two cyclists "
    "come towards it and the pavement reflects the lights."
)
TRANSFORM = {"fit": "cover", "crop": "center", "filter": "area-bicubic", "sample_aspect": "1"}
VARIANT = VARIANTS["t2v-1.3b"]
PROVENANCE = {
    "latents": {
        "kind": "latents", "simulated": True, "z_dim": VARIANT.vae.z_dim, "normalized": True,
        "latents_mean": list(VARIANT.vae.latents_mean),
        "latents_std": list(VARIANT.vae.latents_std),
    },
    "text": {
        "kind": "text", "simulated": True, "text_dim": VARIANT.shape.text_dim,
        "max_sequence_length": VARIANT.shape.num_text_tokens,
    },
}  # fmt: skip
FINGERPRINT = {kind: fingerprint(value) for kind, value in PROVENANCE.items()}
ENCODINGS = {kind: Encoding.of(value) for kind, value in PROVENANCE.items()}


def key_of(kind: schema.Kind, number: int) -> str:
    """A key like any sha256, for a number."""
    return hashlib.sha256(f"{kind} {number}".encode()).hexdigest()


def clip_of(number: int) -> ViewClip:
    """One clip in twenty is held out."""
    return ViewClip(
        clip_id=f"video-{number // 8:06d}_{number % 8:03d}",
        key=key_of("latents", number),
        bucket=BUCKETS[number // ROWS % len(BUCKETS)],
        prompts=(key_of("text", number),),
        activity=f"activity-{number % ACTIVITIES:03d}",
        split="val" if number % 20 == 0 else "train",
        source_group=f"video-{number // 8:06d}",
    )


def view_of(num_clips: int) -> View:
    """The view of all clips."""
    return View(
        encodings=ENCODINGS,
        model="simulated",
        variant=VARIANT.name,
        shift=3.0,
        empty_prompt=key_of("text", 0),
        negative_prompt=key_of("text", 1),
        validation_prompts=(),
        clips=tuple(clip_of(number) for number in range(num_clips)),
        name="default",
    )


def write_records(cache: Path, num_clips: int, *, first: int = 0) -> None:
    """Commit records of the clips `first` to `num_clips`, and of as many captions."""
    for kind, provenance in PROVENANCE.items():
        with tempfile.TemporaryDirectory() as folder:
            template = _record(Path(folder), kind)
        names = [f"{key_of(kind, slot)}" for slot in range(ROWS)]
        for start in range(first, num_clips, ROWS):
            bucket = clip_of(start).bucket
            shape = latent_shape(bucket) if kind == "latents" else TEXT_SHAPE
            parent = cache / schema.segments_key(kind, FINGERPRINT[kind], shape)
            if not parent.exists():
                write_groups(cache, kind, provenance, shape)
            document = template
            for slot, name in enumerate(names):
                document = document.replace(name, key_of(kind, start + slot))
            folder = parent / hashlib.sha256(f"{kind} segment {start}".encode()).hexdigest()[:16]
            folder.mkdir()
            (folder / schema.GROUP).write_bytes(schema.signed(document.encode()))


def _record(cache: Path, kind: schema.Kind) -> str:
    """The commit record of one segment of 32 small rows, as stage one has it written."""
    rng = np.random.default_rng(0)
    shape = (16, 1, 2, 2) if kind == "latents" else (512, 8)
    with SegmentWriter(
        cache, kind=kind, provenance=PROVENANCE[kind], shape=shape, dtype="float16", rows=ROWS,
        max_bytes=2**27, max_seconds=1e9, writer={"torch": "2.13.0", "device": "NVIDIA H100"},
    ) as writer:  # fmt: skip
        for slot in range(ROWS):
            clip = clip_of(slot)
            source = {
                "clip_id": clip.clip_id, "path": f"/data/videos/{clip.source_group}.mp4",
                "kind": "video", "start_s": 5.0625, "fps": 16.0, "bucket": list(clip.bucket),
                "transform": TRANSFORM,
            }  # fmt: skip
            equations = rng.standard_normal((17, 17)), rng.standard_normal((17, 3))
            writer.add(
                key_of(kind, slot),
                rng.standard_normal(shape if kind == "latents" else (3, shape[1])),
                source=source if kind == "latents" else f"{slot:03d} {CAPTION}",
                rgb=equations if kind == "latents" else None,
            )
    (segment,) = read_records(cache, kind, FINGERPRINT[kind])
    record = (cache / segment.key / schema.GROUP).read_text()
    return record.replace(segment.record["checksum"], schema.UNSUMMED)
