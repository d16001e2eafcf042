"""`wanlora inspect`: what is in a cache, and whether it is whole.

Owns: the survey of a store and its views, and the order of the jobs that were asked for.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from wanlora.config import InspectConfig
from wanlora.core.buckets import SPATIAL_FACTOR, TEMPORAL_FACTOR, Bucket
from wanlora.core.location import Location
from wanlora.errors import CorruptRowError, StoreError, StoreVersionError
from wanlora.inspect_cache import checks, decode, mend, page
from wanlora.inspect_cache.result import InspectResult
from wanlora.inspect_cache.statistics import BucketStatistics, evenly
from wanlora.store import index, objects, schema
from wanlora.store.index import Segment
from wanlora.store.reader import RowReader
from wanlora.store.schema import Kind
from wanlora.store.views import View, read_view, view_names

Readers = dict[tuple[Kind, str], RowReader]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """A cache as it was found: who can read what, and what cannot be used."""

    cache: Location
    readers: Readers
    segments: dict[tuple[Kind, str], list[Segment]]
    provenances: dict[tuple[Kind, str], dict[str, Any]]
    views: list[View]
    invalid: list[str]
    sizes: dict[str, objects.Entry] = field(repr=False)

    def num_bytes(self, key: str) -> int:
        """Bytes of everything under a key."""
        return sum(e.num_bytes for name, e in self.sizes.items() if name.startswith(f"{key}/"))

    def clip_names(self) -> dict[str, str]:
        """A clip id for each key that a view names."""
        return {clip.key: clip.clip_id for view in self.views for clip in view.clips}


def run(config: InspectConfig) -> InspectResult:
    """Summarize a cache; do the jobs that were asked for.

    Raises:
        StoreError: There is no cache, or the disk refuses.
        StoreVersionError: It belongs to another release.
    """
    index.open_store(config.path)
    repaired = mend.repair(config) if config.repair else {}
    freed = mend.gc(config) if config.gc else {}
    found = survey(config.path)
    level = "full" if config.repair else config.verify or ""
    invalid, unread = _verified(found, level)
    invalid = found.invalid + invalid
    everything = level == "full" or config.html is not None
    statistics = _statistics(
        found, None if everything else config.statistics_clips, invalid, unread
    )
    if config.html is not None:
        page.write(
            config.html,
            cache=config.path,
            views=found.views,
            readers=found.readers,
            statistics=statistics,
            most=config.html_clips,
        )
    clips, num_bytes = _num_different(found, "latents"), found.num_bytes(schema.STORE)
    return InspectResult(
        cache=str(config.path),
        clips=clips,
        prompts=_num_different(found, "text"),
        buckets=_buckets(found, statistics),
        bytes=num_bytes,
        bytes_per_clip=num_bytes / clips if clips else 0.0,
        fingerprints=_fingerprints(found),
        views=[_view(view, found.readers) for view in found.views],
        invalid=invalid,
        unread=unread,
        verified=sum(len(r.rows) for r in found.readers.values()) if level else 0,
        level=level,
        repaired=repaired,
        freed=freed,
        page=str(config.html or ""),
        decoded=decode.run(config, found.views, found.readers),
    )


def survey(cache: Location) -> Survey:
    """Read all commit records and views."""
    invalid: list[str] = []
    readers: Readers = {}
    all_segments = {}
    provenances = {}
    for kind in schema.KINDS:
        for fingerprint, provenance in index.provenances(cache, kind).items():
            segments, damaged = index.scan(cache, kind, fingerprint)
            invalid += [record.message for record in damaged]
            all_segments[kind, fingerprint] = segments
            readers[kind, fingerprint] = RowReader.of_segments(cache, kind, segments)
            provenances[kind, fingerprint] = provenance
    views = list(_views(cache, invalid))
    sizes = objects.listing(cache, schema.STORE)
    return Survey(cache, readers, all_segments, provenances, views, invalid, sizes)


def _views(cache: Location, invalid: list[str]) -> Iterator[View]:
    for name in view_names(cache):
        try:
            yield read_view(cache, name)
        except StoreVersionError:
            raise
        except StoreError as error:
            invalid.append(str(error))


def _verified(found: Survey, level: str) -> tuple[list[str], list[str]]:
    """A line for each bad row, and one for each that could not be read."""
    if level == "fast":
        segments = [s for group in found.segments.values() for s in group]
        return [bad.message for bad in checks.fast(found.cache, segments)], []
    if level == "full":
        verdict = checks.full(found.cache, _segments_by_kind(found))
        return [bad.message for bad in verdict.bad], verdict.unread
    return [], []


def _segments_by_kind(found: Survey) -> dict[Kind, list[Segment]]:
    by_kind: dict[Kind, list[Segment]] = {}
    for (kind, _), segments in found.segments.items():
        by_kind.setdefault(kind, []).extend(segments)
    return by_kind


def _statistics(
    found: Survey, number: int | None, invalid: list[str], unread: list[str]
) -> dict[Shape, BucketStatistics]:
    """Statistics of each latent shape, over `number` clips of each or over all."""
    statistics: dict[Shape, BucketStatistics] = {}
    for (kind, _), reader in found.readers.items():
        if kind != "latents":
            continue
        by_shape: dict[Shape, list[str]] = {}
        for key, row in reader.rows.items():
            by_shape.setdefault(_shape_of(row.segment), []).append(key)
        for shape, keys in by_shape.items():
            sums = statistics.setdefault(shape, BucketStatistics())
            for key in evenly(keys, len(keys) if number is None else number):
                try:
                    sums.add(key, reader.read(key))
                except StoreError as error:
                    lines = invalid if isinstance(error, CorruptRowError) else unread
                    if str(error) not in lines:
                        lines.append(str(error))
    return statistics


def _num_different(found: Survey, kind: Kind) -> int:
    tables = (reader.rows for (one, _), reader in found.readers.items() if one == kind)
    return len({key for rows in tables for key in rows})


def _fingerprints(found: Survey) -> list[dict[str, Any]]:
    return [
        {
            "kind": kind,
            "fingerprint": fingerprint,
            "rows": len(reader.rows),
            "segments": len(reader.rows.segments),
            "bytes": found.num_bytes(schema.fingerprint_key(kind, fingerprint)),
            "provenance": found.provenances[kind, fingerprint],
        }
        for (kind, fingerprint), reader in found.readers.items()
    ]


def _buckets(found: Survey, statistics: dict[Shape, BucketStatistics]) -> list[dict[str, Any]]:
    """Clips and bytes of each size, over all fingerprints."""
    clips: Counter[Shape] = Counter()
    num_bytes: Counter[Shape] = Counter()
    for (kind, _), reader in found.readers.items():
        if kind == "latents":
            clips.update(_shape_of(row.segment) for row in reader.rows.values())
    for key, entry in found.sizes.items():
        parts = key.split("/")  # store.zarr/latents/<fp>/<shape>/<segment>/...
        if parts[1] == "latents" and len(parts) > 5:
            num_bytes[schema.shape_of("/".join(parts[:4]))] += entry.num_bytes
    names = found.clip_names()
    return [
        {
            "bucket": str(_bucket_of(shape)),
            "latent_shape": list(shape),
            "clips": clips[shape],
            "bytes": num_bytes[shape],
            "bytes_per_clip": num_bytes[shape] / clips[shape],
            "statistics": statistics[shape].summary(names),
        }
        for shape in sorted(clips)
    ]


def _shape_of(segment: str) -> Shape:
    return schema.shape_of(segment.rpartition("/")[0])


def _bucket_of(shape: Sequence[int]) -> Bucket:
    """Size of a clip in pixels from that of its latents C F H W; inverse of `latent_shape`."""
    _, frames, height, width = shape
    return Bucket(
        1 + TEMPORAL_FACTOR * (frames - 1), SPATIAL_FACTOR * height, SPATIAL_FACTOR * width
    )


def _view(view: View, readers: Readers) -> dict[str, Any]:
    latents, text = readers.get(("latents", view.latents)), readers.get(("text", view.text))
    clips = {} if latents is None else latents.rows
    prompts = {} if text is None else text.rows
    return {
        "name": view.name,
        "clips": len(view.clips),
        "splits": dict(sorted(Counter(clip.split for clip in view.clips).items())),
        "prompts": len(view.prompt_keys()),
        "model": view.model,
        "missing_clips": [clip.clip_id for clip in view.clips if clip.key not in clips],
        "missing_prompts": [key for key in view.prompt_keys() if key not in prompts],
    }
