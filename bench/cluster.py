"""Arithmetic of docs/scale.md: what so many clips need of a store, of GPUs and of a network.

Owns: the assumptions, each named once, and the formulas. `M` measured by the script named, `C`
counted, `P` predicted, `A` assumed.
"""

from math import ceil
from typing import Any

CLIPS = (1_000, 100_000, 1_000_000)
CLIP_BYTES = 4.81e6
"""M: latents and a prompt of about 130 tokens, 81x480x832 (bench/store.py formats)."""

ROWS = 32
STEP_S = 1.66
"""P: T2V-1.3B, LoRA on attention, one H100 (wanlora estimate)."""

ENCODE_S = 1.5
"""P: a clip through the VAE in fp32 with TF32, one H100 (docs/benchmarks.md)."""

DECODE_CPU_S = 1.71
"""M: 81 frames from 1080p H.264, one core (bench/decode.py)."""

GPUS, GPUS_A_NODE = 64, 8
LIST_S = GET_S = 0.1
"""A: a request to S3, the lower of the 100-200 ms that AWS names for small objects."""

LIST_KEYS = 1_000
REQUESTS_A_PREFIX = 5_500
"""GETs a second that S3 promises a prefix (AWS, "Optimizing Amazon S3 performance")."""

STREAM_BYTES_S = 85e6
"""A: one S3 download, the lower of the 85-90 MB/s that AWS names for a connection."""

REQUESTS_AT_ONCE = 64
"""C: of one process (store/objects.py)."""


def column(clips: int, found: dict[str, Any]) -> dict[str, float]:
    """What so many clips need; figures that grow with the clips are scaled from those measured."""
    share = clips / found["clips"]
    requests = found["requests"][0]
    segments = ceil(clips / ROWS)
    objects = segments * (requests["objects_latents"] + requests["objects_text"])
    pages = ceil(objects / LIST_KEYS)
    records = 2 * segments
    rows = {row["what"]: row for name in ("index", "view", "start") for row in found[name]}
    snapshot = rows["leave a snapshot"]["mb"] * 1e6 * share
    scan_s = max(records * GET_S / REQUESTS_AT_ONCE, GPUS * records / REQUESTS_A_PREFIX)
    clips_a_s = GPUS / STEP_S
    nodes = GPUS // GPUS_A_NODE
    touched = 1 - (1 - 1 / nodes) ** ROWS
    return {
        "store, GB": clips * CLIP_BYTES / 1e9,
        "objects": objects,
        "commit records": records,
        "commit records, MB": found["records"][0]["mb"] * share,
        "LIST requests for all objects": pages,
        "rows of one rank, all records read, CPU-s":
            rows["no snapshot: every record read"]["cpu_s"] * share,
        "rows of one rank, snapshot, CPU-s": rows["with the snapshot"]["cpu_s"] * share,
        "rows of one rank, records kept, MB":
            rows["as it was: every record kept, dicts"]["kept_mb"] * share,
        "rows of one rank, columns, MB": rows["with the snapshot"]["kept_mb"] * share,
        "S3, all records, one process, s": pages * LIST_S + records * GET_S / REQUESTS_AT_ONCE,
        "S3, all records, 64 ranks at once, s": pages * LIST_S + scan_s,
        "S3, snapshot, s": pages * LIST_S + snapshot / STREAM_BYTES_S,
        "S3, view, s": rows["read"]["mb"] * 1e6 * share / STREAM_BYTES_S,
        "snapshots, MB": snapshot / 1e6,
        "view, MB": rows["read"]["mb"] * share,
        "view read, CPU-s": rows["read"]["cpu_s"] * share,
        "start of a rank, CPU-s": rows["view, rows, order, panels"]["cpu_s"] * share,
        "start of a rank, peak MB": rows["view, rows, order, panels"]["peak_mb"] * share,
        "start of a rank, kept MB": rows["view, rows, order, panels"]["kept_mb"] * share,
        "clips read a second, 64 GPUs": clips_a_s,
        "GETs a second": clips_a_s * requests["gets"],
        "GB a second from the store": clips_a_s * CLIP_BYTES / 1e9,
        "GB a second at first, whole segments copied": clips_a_s * ROWS * CLIP_BYTES / 1e9,
        "local copy of a node after an epoch, GB": touched * clips * CLIP_BYTES / 1e9,
        "encode, GPU hours": clips * ENCODE_S / 3600,
        "encode, hours on 8 GPUs": clips * ENCODE_S / 3600 / 8,
        "encode, hours on 64 GPUs": clips * ENCODE_S / 3600 / 64,
        "decode cores, 64 GPUs": 64 * DECODE_CPU_S / ENCODE_S,
        "epoch, hours on 8 GPUs": clips * STEP_S / 8 / 3600,
        "epoch, hours on 64 GPUs": clips * STEP_S / 64 / 3600,
    }  # fmt: skip


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a figure, a column a number of clips."""
    columns = {clips: column(clips, found) for clips in CLIPS}
    return [
        {"figure": name} | {f"{clips:,}": shown(columns[clips][name]) for clips in CLIPS}
        for name in columns[CLIPS[0]]
    ]


def shown(value: float) -> str:
    """Three digits, or all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
