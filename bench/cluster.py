"""Arithmetic of docs/scale.md: what so many clips need of a store, of GPUs and of a network.

Owns: the assumptions, each named once with where it comes from, and the formulas.
"""

from math import ceil
from typing import Any

CLIPS = (1_000, 100_000, 1_000_000)
CLIP_BYTES = 4.81e6
"""Measured: latents and a prompt of about 130 tokens, 81x480x832 (bench/store.py formats)."""

COPIED_CLIP_BYTES = 5.31e6
"""Measured: the same as .npy files, which --local-copy writes (bench/store.py formats)."""

ROWS = 32
STEP_S = 1.66
"""Predicted: T2V-1.3B, LoRA on attention, one H100 (wanlora estimate)."""

ENCODE_S = 1.5
"""Predicted: a clip through the VAE in fp32 with TF32, one H100 (docs/benchmarks.md)."""

DECODE_CPU_S = 1.71
"""Measured: 81 frames from 1080p H.264, one core (bench/decode.py)."""

GPUS, GPUS_A_NODE = 64, 8
LIST_S = GET_S = 0.1
"""Assumed: a request to S3, the lower of the 100-200 ms that AWS names for small objects."""

LIST_KEYS = 1_000
REQUESTS_A_PREFIX = 5_500
"""GETs a second that S3 promises a prefix (AWS, "Optimizing Amazon S3 performance")."""

STREAM_BYTES_S = 85e6
"""Assumed: one S3 download, the lower of the 85-90 MB/s that AWS names for a connection."""

REQUESTS_AT_ONCE = 64
"""Counted: of one process (store/bucket.py)."""


def column(clips: int, found: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """What so many clips need, each with the weakest of what it rests on.

    Figures that grow with the clips are scaled from those measured.
    """
    share = clips / found["clips"]
    rows = {row["what"]: row for name in ("index", "view", "start") for row in found[name]}
    requests = found["requests"][0]
    segments = ceil(clips / ROWS)
    objects = segments * (requests["objects_latents"] + requests["objects_text"])
    pages, records = ceil(objects / LIST_KEYS), 2 * segments
    listed_s = pages * LIST_S
    snapshot = rows["leave a snapshot"]["mb"] * 1e6 * share
    clips_a_s, nodes = GPUS / STEP_S, GPUS // GPUS_A_NODE
    start = rows["view, rows, order, panels"]
    as_it_was = rows["as it was: every record kept, dicts"]
    alone_s = records * GET_S / REQUESTS_AT_ONCE
    throttled_s = max(alone_s, GPUS * records / REQUESTS_A_PREFIX)
    return {
        "store, GB": ("measured", clips * CLIP_BYTES / 1e9),
        "objects": ("counted", objects),
        "LIST requests for all objects": ("counted", pages),
        "commit records": ("counted", records),
        "commit records, MB": ("measured", found["records"][0]["mb"] * share),
        "snapshots, MB": ("measured", snapshot / 1e6),
        "view, MB": ("measured", rows["read"]["mb"] * share),
        "rows, records kept (as it was), CPU-s": ("measured", as_it_was["cpu_s"] * share),
        "rows, records read, CPU-s":
            ("measured", rows["no snapshot: every record read"]["cpu_s"] * share),
        "rows, snapshot, CPU-s": ("measured", rows["with the snapshot"]["cpu_s"] * share),
        "rows, records kept (as it was), MB": ("measured", as_it_was["kept_mb"] * share),
        "rows, columns, MB": ("measured", rows["with the snapshot"]["kept_mb"] * share),
        "a rank's data before step 0, CPU-s": ("measured", start["cpu_s"] * share),
        "a rank's data, peak MB": ("measured", start["peak_mb"] * share),
        "a rank's data, kept MB": ("measured", start["kept_mb"] * share),
        "S3: LIST, then all records, s": ("assumed", listed_s + alone_s),
        "S3: the same on 64 ranks at once, s": ("assumed", listed_s + throttled_s),
        "S3: LIST, then the snapshot, s": ("assumed", listed_s + snapshot / STREAM_BYTES_S),
        "S3: the view, s": ("assumed", rows["read"]["mb"] * 1e6 * share / STREAM_BYTES_S),
        "64 GPUs: clips a second": ("predicted", clips_a_s),
        "64 GPUs: GETs a second": ("predicted", clips_a_s * requests["gets"]),
        "64 GPUs: GB a second": ("predicted", clips_a_s * CLIP_BYTES / 1e9),
        "local copy: GB on each of 8 nodes after an epoch":
            ("counted", clips * COPIED_CLIP_BYTES / nodes / 1e9),
        "encode, hours on 1 GPU": ("predicted", clips * ENCODE_S / 3600),
        "encode, hours on 8 GPUs": ("predicted", clips * ENCODE_S / 3600 / 8),
        "encode, hours on 64 GPUs": ("predicted", clips * ENCODE_S / 3600 / GPUS),
        "cores that decode for 64 GPUs": ("predicted", GPUS * DECODE_CPU_S / ENCODE_S),
        "epoch, hours on 8 GPUs": ("predicted", clips * STEP_S / 8 / 3600),
        "epoch, hours on 64 GPUs": ("predicted", clips * STEP_S / GPUS / 3600),
    }  # fmt: skip


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a figure, a column a number of clips."""
    columns = {clips: column(clips, found) for clips in CLIPS}
    return [
        {"figure": name, "how": how}
        | {f"{clips:,} clips": shown(columns[clips][name][1]) for clips in CLIPS}
        for name, (how, _) in columns[CLIPS[0]].items()
    ]


def shown(value: float) -> str:
    """Three digits, or all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
