"""`wanlora inspect`: the content of a cache, and the rows that are damaged or missing.

Owns: the survey of a store and its views, and the order of the requested jobs.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int64

from wanlora.commands.inspect import checks, decoded_clips, page_rows, repair
from wanlora.commands.inspect.collect_garbage import collect_garbage
from wanlora.commands.inspect.statistics import BucketStatistics, evenly
from wanlora.commands.inspect.summary import InspectResult
from wanlora.config import InspectConfig
from wanlora.core.buckets import SPATIAL_FACTOR, TEMPORAL_FACTOR, Bucket
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import CorruptRowError, StoreError, StoreVersionError
from wanlora.report.generated import require_own_page
from wanlora.store import index, schema, storage, wants
from wanlora.store.maintenance import Limits
from wanlora.store.row_reader import RowReader
from wanlora.store.rows import Rows
from wanlora.store.views import View, read_view, view_names

Readers = dict[tuple[Kind, str], RowReader]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """Readers of a cache, and the parts that cannot be used."""

    cache: Location
    readers: Readers
    provenances: dict[tuple[Kind, str], dict[str, Any]]
    views: list[View]
    invalid: list[str]
    sizes: dict[str, storage.Entry] = field(repr=False)

    def num_bytes(self, key: str) -> int:
        """Return the bytes of all objects under a key."""
        return sum(e.num_bytes for name, e in self.sizes.items() if name.startswith(f"{key}/"))

    def clip_names(self) -> dict[str, str]:
        """Clip id by key, for the keys that a view names."""
        return {clip.key: clip.clip_id for view in self.views for clip in view.clips}


def run(config: InspectConfig) -> InspectResult:
    """Summarize a cache; do the requested jobs.

    Raises:
        StoreError: There is no cache, or the disk refuses.
        StoreVersionError: It belongs to another release.
        OutputError: The folder of the page may not be written.
    """
    require_own_page(config.html, "inspect", flag="--html")
    if not config.repair:  # which restores the store's document
        index.open_store(config.path)
    repaired, freed = _maintain(config)
    found = survey(config.path)
    level = "full" if config.repair else config.verify or ""
    invalid, unread = _verified(found, level)
    invalid = list(dict.fromkeys(found.invalid + invalid))
    everything = level == "full" or config.html is not None
    statistics = _statistics(
        found, None if everything else config.statistics_clips, invalid, unread
    )
    if config.html is not None:
        page_rows.write(
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
        wants=_wants(found, invalid),
        invalid=invalid,
        unread=unread,
        verified=sum(len(r.rows) for r in found.readers.values()) if level else 0,
        level=level,
        repaired=repaired,
        freed=freed,
        page=str(config.html or ""),
        decoded=decoded_clips.decode_clips(
            config.decode,
            found.views,
            found.readers,
            cache=config.path,
            device=config.device,
            output_dir=config.output_dir,
        ),
    )


def _maintain(config: InspectConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Repair the cache or collect its garbage, if requested; return the counts of both."""
    limits = Limits(config.store.clips_per_segment, config.store.segment_bytes)
    repaired: dict[str, Any] = {}
    freed: dict[str, Any] = {}
    if config.repair:
        encode_rows = partial(
            repair.encode_from_manifests,
            cache=config.path,
            limits=limits,
            manifests=config.manifest,
            source_root=config.source_root,
            device=config.device,
        )
        repaired = repair.repair(config.path, limits, encode_rows)
    if config.gc:
        freed = collect_garbage(
            config.path,
            limits,
            min_age_h=config.gc_min_age_h,
            drop_wants=config.gc_drop_wants,
            dry_run=config.dry_run,
        )
    return repaired, freed


def survey(cache: Location) -> Survey:
    """Read all views, and the locations of all rows."""
    invalid: list[str] = []
    readers: Readers = {}
    provenances = {}
    for kind in schema.KINDS:
        for fingerprint, provenance in index.provenances(cache, kind).items():
            rows, damaged = index.look(cache, kind, fingerprint)
            invalid += [record.message for record in damaged]
            readers[kind, fingerprint] = RowReader.of_generation(cache, kind, fingerprint, rows)
            provenances[kind, fingerprint] = provenance
    views = list(_views(cache, invalid))
    sizes = storage.at(cache).listing(schema.STORE)
    return Survey(cache, readers, provenances, views, invalid, sizes)


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
        return [bad.message for bad in checks.fast(found.cache, list(found.readers))], []
    if level == "full":
        verdict = checks.full(found.cache, list(found.readers))
        return [bad.message for bad in verdict.bad], verdict.unread
    return [], []


def _statistics(
    found: Survey, number: int | None, invalid: list[str], unread: list[str]
) -> dict[Shape, BucketStatistics]:
    """Statistics of each latent shape, over `number` clips of each or over all."""
    statistics: dict[Shape, BucketStatistics] = {}
    for (kind, _), reader in found.readers.items():
        if kind != "latents":
            continue
        for shape, places in _by_shape(reader.rows).items():
            sums = statistics.setdefault(shape, BucketStatistics())
            for place in evenly(places.tolist(), len(places) if number is None else number):
                key = reader.rows.row_keys[place].decode()
                try:
                    sums.add(key, reader.read(key))
                except StoreError as error:
                    lines = invalid if isinstance(error, CorruptRowError) else unread
                    if str(error) not in lines:
                        lines.append(str(error))
    return statistics


def _by_shape(rows: Rows) -> dict[Shape, Int64[np.ndarray, " n"]]:
    """Indices of the rows of each latent shape, repeated rows once."""
    shapes = [_shape_of(segment) for segment in rows.segments]
    number = {shape: i for i, shape in enumerate(dict.fromkeys(shapes))}
    of_segment = np.array([number[shape] for shape in shapes], np.int64)
    firsts = rows.firsts()
    of_row = of_segment[rows.segment_indices[firsts]]
    return {shape: firsts[of_row == i] for shape, i in number.items()}


def _num_different(found: Survey, kind: Kind) -> int:
    tables = [reader.rows for (one, _), reader in found.readers.items() if one == kind]
    if len(tables) == 1:
        return len(tables[0])
    return len(np.unique(np.concatenate([rows.row_keys for rows in tables]))) if tables else 0


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
            for shape, places in _by_shape(reader.rows).items():
                clips[shape] += len(places)
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
    missing = {
        str(kind): _missing(readers.get((kind, view.fingerprint(kind))), view.keys(kind))
        for kind in view.kinds
    }
    lost = {key for kind, keys in missing.items() if kind != "text" for key in keys}
    return {
        "name": view.name,
        "clips": len(view.clips),
        "splits": dict(sorted(Counter(clip.split for clip in view.clips).items())),
        "prompts": len(view.prompt_keys()),
        "model": view.model,
        "missing": {kind: len(keys) for kind, keys in missing.items()},
        "missing_clips": [clip.clip_id for clip in view.clips if clip.key in lost],
        "missing_prompts": missing["text"],
    }


def _missing(reader: RowReader | None, keys: list[str]) -> list[str]:
    return keys if reader is None else reader.rows.missing(keys)


def _wants(found: Survey, invalid: list[str]) -> list[dict[str, Any]]:
    """A dict for each unfinished run of cache-latents: name, view, rows, missing."""
    listed = []
    for name in wants.names(found.cache):
        try:
            named = wants.read(found.cache, name)
        except StoreVersionError:
            raise
        except StoreError as error:
            invalid.append(str(error))
            continue
        missing = 0
        for where, keys in named.items():
            reader = found.readers.get(where)
            missing += len(keys) if reader is None else reader.rows.num_missing(keys)
        rows = sum(map(len, named.values()))
        listed.append({"name": name, "view": wants.view_of(name), "rows": rows, "missing": missing})
    return listed
