"""What a cache of a million clips costs to open and to train on: `python bench/scale.py`.

Sections: records (commit records of a simulated store), index (which rows are committed), view,
order (which clips a step gets), start (what `train` does before its first batch), commands (a rank
of cache-latents, inspect and gc), requests (to an object store, counted), cluster (the table of
docs/scale.md, computed from all of them). The code
measured is that of the package; beside it, in the same process, stands what it replaced. Each
measurement is a process of its own: seconds, CPU-seconds and peak memory are its own too.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cluster
import figures
import numpy as np
import simulated
from simulated import BUCKETS, FINGERPRINT, PROVENANCE, ROWS, TEXT_SHAPE
from zarr.storage import ObjectStore

from wanlora.commands.cache_latents.claims import CommittedRows
from wanlora.commands.inspect import run as inspect
from wanlora.commands.train.opening_data import open_data
from wanlora.commands.train.preflight import select
from wanlora.config import InspectConfig, TrainConfig
from wanlora.core.buckets import Bucket, latent_shape
from wanlora.core.location import Url
from wanlora.store import index, schema, storage
from wanlora.store.commit_records import read_records
from wanlora.store.folder import Folder
from wanlora.store.reader import StoreReader
from wanlora.store.rows import Rows
from wanlora.store.views import ViewClip, read_view, write_view
from wanlora.store.writer import SegmentWriter
from wanlora.training.order import Order

GLOBAL_BATCH = 64
EPOCHS = 10

Measured = tuple[Any, dict[str, Any]]
"""What to hold while memory is looked at, and what was counted."""


def measured(what: str, work: Callable[..., Measured], *arguments: Any) -> dict[str, Any]:
    """Run in a forked process, which begins with what this one has; say what it took."""
    context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    found = ours.recv()  # an EOFError here: the process failed, and has said why
    process.join()
    return {"what": what, **found}


def _child(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    before, started, cpu = memory_mb("VmRSS"), time.perf_counter(), time.process_time()
    held, counts = work(*arguments)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    gc.collect()
    took = {"s": seconds, "cpu_s": cpu, "peak_mb": memory_mb("VmHWM") - before,
            "kept_mb": memory_mb("VmRSS") - before}  # fmt: skip
    pipe.send(took | counts)
    del held


def memory_mb(field: str) -> float:
    """A field of this process's status, NaN where there is no such thing (not on Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), np.nan)


# --- records ---


def records(cache: Path, num_clips: int) -> list[dict]:
    """Commit records of a store of so many clips, and as many captions; no rows."""
    row = measured("write", lambda: (simulated.write_records(cache, num_clips), {}))
    sizes = [record.stat().st_size for record in (cache / schema.STORE).rglob(schema.GROUP)]
    return [row | {"records": len(sizes), "mb": sum(sizes) / 1e6}]


# --- index ---


def scanned_into_dicts(cache: Path) -> Measured:
    """As it was: every record parsed and kept, a dict of objects by key."""
    kept = []
    for kind in PROVENANCE:
        segments = list(read_records(cache, kind, FINGERPRINT[kind]))
        kept.append(segments)
        rows = {}
        for segment in segments:
            for row, (key, crc) in enumerate(zip(segment.row_keys, segment.crc32c, strict=True)):
                rows.setdefault(key, (segment.key, row, crc))
        kept.append(rows)
    return kept, {"records_read": sum(map(len, kept[::2]))}


def committed(cache: Path, known: dict[str, Rows] | None = None) -> Measured:
    with counted_records() as read:
        rows = {
            kind: index.committed(cache, kind, FINGERPRINT[kind], known=known and known[kind])
            for kind in PROVENANCE
        }
    return rows, {"records_read": read["records"]}


def keep(cache: Path, rows: dict[str, Rows]) -> Measured:
    for kind in PROVENANCE:
        index.keep(cache, kind, FINGERPRINT[kind], rows[kind])
    return None, {"mb": storage.num_bytes(cache, schema.SNAPSHOTS) / 1e6}


@contextmanager
def counted_records() -> Iterator[Counter]:
    original, read = Folder.get, Counter()

    def get(self: Folder, key: str) -> bytes | None:
        read["records"] += key.endswith(schema.GROUP)
        return original(self, key)

    Folder.get = get
    try:
        yield read
    finally:
        Folder.get = original


def scan(cache: Path, num_clips: int) -> list[dict]:
    """Which rows are committed: latents and prompts."""
    rows = [
        measured("as it was: every record kept, dicts", scanned_into_dicts, cache),
        measured("no snapshot: every record read", committed, cache),
    ]
    known, _ = committed(cache)
    rows += [
        measured("leave a snapshot", keep, cache, known),
        measured("with the snapshot", committed, cache),
    ]
    simulated.write_records(cache, num_clips + 32 * ROWS, first=num_clips)
    rows += [measured("a writer's next look, 32 + 32 segments later", committed, cache, known)]
    return [{"what": "", "records_read": None, "mb": None} | row for row in rows]


# --- view ---


def parsed_at_once(cache: Path) -> Measured:
    """As it was: all lines, then all their dicts, then clips that share nothing."""
    data = (cache / schema.VIEWS / "default.jsonl").read_bytes()
    _, *lines = [json.loads(line) for line in data.decode().splitlines()]
    clips = tuple(
        ViewClip(line["clip_id"], line["key"], Bucket(*line["bucket"]), tuple(line["prompts"]),
                 line["activity"], line["split"], line["source_group"])
        for line in lines
    )  # fmt: skip
    return clips, {}


def view(cache: Path, num_clips: int) -> list[dict]:
    """The list of clips that training reads."""

    def write() -> Measured:
        return write_view(cache, "default", simulated.view_of(num_clips)), {}

    rows = [
        measured("make and write", write),
        measured("as it was: parsed at once", parsed_at_once, cache),
        measured("read", lambda: (read_view(cache, "default"), {})),
    ]
    size = (cache / schema.VIEWS / "default.jsonl").stat().st_size / 1e6
    return [row | {"mb": size} for row in rows]


# --- order ---


def order_of(num_clips: int, *, balanced: bool) -> Order:
    sizes = {bucket: max(1, int(share * num_clips))
             for bucket, share in zip(BUCKETS, (0.5, 0.3, 0.2), strict=True)}  # fmt: skip
    names = [f"activity-{i:03d}" for i in range(simulated.ACTIVITIES)]
    activities = {b: [names[i % len(names)] for i in range(size)] for b, size in sizes.items()}
    return Order(sizes, batch_size=GLOBAL_BATCH, seed=0,
                 activities=activities if balanced else None)  # fmt: skip


def order(_cache: Path, num_clips: int) -> list[dict]:
    """Which clips each step gets, of three buckets; global batch 64, the same on every rank."""
    steps = num_clips // GLOBAL_BATCH
    rows = []
    for balanced in (False, True):
        name = f"{simulated.ACTIVITIES} activities balanced: " if balanced else ""

        def make(*steps: int, balanced: bool = balanced) -> Measured:
            made = order_of(num_clips, balanced=balanced)
            for step in steps:
                made.batch(step)
            return made, {}

        rows += [
            measured(f"{name}to the first step", make, 0),
            measured(f"{name}all steps of an epoch", make, *range(steps)),
            measured(f"{name}resumed after {EPOCHS} epochs", make, EPOCHS * steps),
        ]
    return [
        *rows,
        measured("as it was: a pass over the clips for each activity", passes, num_clips),
    ]


def passes(num_clips: int) -> Measured:
    names = [f"activity-{i % simulated.ACTIVITIES:03d}" for i in range(num_clips)]
    members = [
        [i for i, activity in enumerate(names) if activity == name] for name in sorted(set(names))
    ]
    return members, {}


# --- start ---


def start(cache: Path, _num_clips: int) -> list[dict]:
    """What a rank of `train` does about its data before it loads the transformer."""
    config = TrainConfig(cache=cache, gradient_accumulation_steps=GLOBAL_BATCH)

    def begin() -> Measured:
        data = open_data(config, simulated.VARIANT, select(config))
        data.source.order.batch(0)
        return data, {"trained_on": len(data.clips)}

    return [measured("view, rows, order, panels", begin)]


# --- commands ---


def commands(cache: Path, _num_clips: int) -> list[dict]:
    """What a rank of cache-latents sees before it encodes; inspect; inspect --gc --dry-run."""
    config = InspectConfig(path=cache, statistics_clips=0)

    def look() -> Measured:
        seen = {kind: CommittedRows(cache, kind, FINGERPRINT[kind]) for kind in PROVENANCE}
        for committed_rows in seen.values():
            committed_rows.look()
        return seen, {}

    def inspected(**changes: Any) -> Measured:
        return inspect(config.model_copy(update=changes)), {}

    rows = [
        measured("a rank of cache-latents: rows, snapshot", look),
        measured("inspect", inspected),
        measured("inspect --gc --dry-run", lambda: inspected(gc=True, dry_run=True)),
    ]
    storage.at(cache).remove_tree(schema.SNAPSHOTS)
    return [*rows, measured("a rank of cache-latents: rows, no snapshot", look)]


# --- requests ---


def requests(_cache: Path, _num_clips: int) -> list[dict]:
    """Objects of a segment, and requests to an object store to read one clip with its prompt."""
    root = Url(f"memory:///{os.getpid()}")
    shapes = {"latents": latent_shape(BUCKETS[0]), "text": TEXT_SHAPE}
    tokens, rng = 133, np.random.default_rng(0)
    for kind, shape in shapes.items():
        with SegmentWriter(
            root, kind=kind, provenance=PROVENANCE[kind], shape=shape, dtype="float16", rows=4,
            max_bytes=2**27, max_seconds=1e9,
        ) as writer:  # fmt: skip
            for number in range(4):
                row = rng.standard_normal(shape if kind == "latents" else (tokens, shape[1]))
                writer.add(simulated.key_of(kind, number), row.astype(np.float16))
    reader = StoreReader(root, encodings=simulated.ENCODINGS)
    rows = []
    for what, number in (("first of its segment", 0), ("again", 1)):
        with counted_gets() as gets:
            reader.latents(simulated.key_of("latents", number))
            latents = gets["gets"]
            reader.prompt_embeds(simulated.key_of("text", number))
        rows.append({"what": what, "gets_latents": latents, "gets_prompt": gets["gets"] - latents,
                     "gets": gets["gets"], "mb": gets["bytes"] / 1e6})  # fmt: skip
    listed = storage.at(root).listing(schema.STORE)
    depth = {"latents": 4, "text": 3}
    for row in rows:
        for kind in PROVENANCE:
            inside = [k for k in listed if k.count("/") > depth[kind] and f"/{kind}/" in k]
            row[f"objects_{kind}"] = len(inside)
    return rows


@contextmanager
def counted_gets() -> Iterator[Counter]:
    original, seen = ObjectStore.get, Counter()

    async def get(self: Any, *arguments: Any, **options: Any) -> Any:
        found = await original(self, *arguments, **options)
        seen["gets"] += 1
        seen["bytes"] += 0 if found is None else len(found)
        return found

    ObjectStore.get = get
    try:
        yield seen
    finally:
        ObjectStore.get = original


SECTIONS = {"records": records, "index": scan, "view": view, "order": order, "start": start,
            "commands": commands, "requests": requests}  # fmt: skip


def main() -> None:
    """Measure, print tables, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    found: dict[str, Any] = {"machine": machine, "clips": options.clips}
    with tempfile.TemporaryDirectory(prefix="wanlora-bench-") as folder:
        for name, section in SECTIONS.items():
            found[name] = section(Path(folder), options.clips)
            title = (section.__doc__ or "").splitlines()[0]
            print(f"\n{name}: {title}\n{figures.table(found[name])}", flush=True)
    found["cluster"] = cluster.table(found)
    print(f"\ncluster: {cluster.__doc__.splitlines()[0]}\n{figures.table(found['cluster'])}")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
