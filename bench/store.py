"""What the store costs, beside what others do: `python bench/store.py`.

Sections: formats (read and write beside safetensors files, tar shards, a memmap), kills (rows lost
and wrong after SIGKILL). CPU time is the figure to trust on a shared machine; wall time is not.
`--tiny` runs everything in seconds, which keeps this file alive. Many clips: `scale.py`.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import figures
import numpy as np
from safetensors.numpy import load_file, save_file

from wanlora.store import index, schema
from wanlora.store.row_reader import RowReader
from wanlora.store.writer import SegmentWriter

PROVENANCE = {kind: {"kind": kind, "bench": True} for kind in schema.KINDS}
FINGERPRINT = {kind: index.fingerprint_of(value) for kind, value in PROVENANCE.items()}


def latents_of(i: int, shape: tuple[int, ...]) -> np.ndarray:
    """Smooth in space and time and a fifth noise: compresses like latents (evidence: 0.945)."""
    rng = np.random.default_rng(i)
    channels, frames, height, width = shape
    coarse = rng.standard_normal((channels, -(-frames // 3), -(-height // 4), -(-width // 4)))
    for axis, factor in ((1, 3), (2, 4), (3, 4)):
        coarse = coarse.repeat(factor, axis)
    smooth = coarse[:, :frames, :height, :width]
    return (0.8 * smooth + 0.6 * rng.standard_normal(shape)).astype(np.float16)


def embeds_of(i: int, width: int) -> np.ndarray:
    """Prompt embeddings of about 133 tokens, rounded to bfloat16 as UMT5's are."""
    rng = np.random.default_rng(10_000 + i)
    values = rng.standard_normal((int(rng.lognormal(4.8, 0.4)) % 511 + 1, width), np.float32) * 0.2
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float16)


def writer(cache: Path, kind: schema.Kind, shape: tuple[int, ...], rows: int = 32) -> SegmentWriter:
    return SegmentWriter(
        cache, kind=kind, provenance=PROVENANCE[kind], shape=shape, dtype="float16", rows=rows,
        max_bytes=2**27, max_seconds=1e9,
    )  # fmt: skip


def rows_of(cache: Path, kind: schema.Kind) -> RowReader:
    return RowReader(cache, kind, index.committed(cache, kind, FINGERPRINT[kind]))


# --- formats ---


def write_store(folder: Path, clips: list) -> None:
    with writer(folder, "latents", clips[0][0].shape) as one:
        for i, (latents, _) in enumerate(clips):
            one.add(f"{i}", latents)
    with writer(folder, "text", (512, clips[0][1].shape[1])) as two:
        for i, (_, embeds) in enumerate(clips):
            two.add(f"{i}", embeds)


def open_store(folder: Path) -> Callable[[int], tuple]:
    latents, text = rows_of(folder, "latents"), rows_of(folder, "text")
    return lambda i: (latents.read(f"{i}"), text.read(f"{i}"))


def write_safetensors(folder: Path, clips: list) -> None:
    for i, (latents, embeds) in enumerate(clips):
        save_file({"latents": latents}, folder / f"{i}_latents.safetensors")
        save_file({"embeds": embeds}, folder / f"{i}_text.safetensors")


def open_safetensors(folder: Path) -> Callable[[int], tuple]:
    return lambda i: (
        load_file(folder / f"{i}_latents.safetensors")["latents"],
        load_file(folder / f"{i}_text.safetensors")["embeds"],
    )


def write_tar(folder: Path, clips: list) -> None:
    for start in range(0, len(clips), 32):
        with tarfile.open(folder / f"{start:06d}.tar", "w") as tar:
            for i in range(start, min(start + 32, len(clips))):
                for name, array in zip(("latents", "embeds"), clips[i], strict=True):
                    buffer = BytesIO()
                    np.save(buffer, array)
                    info = tarfile.TarInfo(f"{i:06d}.{name}.npy")
                    info.size = buffer.tell()
                    buffer.seek(0)
                    tar.addfile(info, buffer)


def open_tar(folder: Path) -> Callable[[int], tuple]:
    """Shards as WebDataset writes them, opened at an offset; WebDataset itself reads in order."""
    places: dict[str, tuple[Path, int, int]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            places |= {m.name: (path, m.offset_data, m.size) for m in tar}

    def one(name: str) -> np.ndarray:
        path, offset, size = places[name]
        with path.open("rb") as file:
            file.seek(offset)
            return np.load(BytesIO(file.read(size)))

    return lambda i: (one(f"{i:06d}.latents.npy"), one(f"{i:06d}.embeds.npy"))


def write_memmap(folder: Path, clips: list) -> None:
    latents = np.lib.format.open_memmap(
        folder / "latents.npy", "w+", np.float16, (len(clips), *clips[0][0].shape)
    )
    embeds = np.lib.format.open_memmap(
        folder / "embeds.npy", "w+", np.float16, (len(clips), 512, clips[0][1].shape[1])
    )
    lengths = []
    for i, (one, two) in enumerate(clips):
        latents[i], embeds[i, : len(two)] = one, two
        lengths.append(len(two))
    latents.flush()
    embeds.flush()
    (folder / "lengths.json").write_text(json.dumps(lengths))


def open_memmap(folder: Path) -> Callable[[int], tuple]:
    latents = np.load(folder / "latents.npy", mmap_mode="r")
    embeds = np.load(folder / "embeds.npy", mmap_mode="r")
    lengths = json.loads((folder / "lengths.json").read_text())
    return lambda i: (np.array(latents[i]), np.array(embeds[i, : lengths[i]]))


FORMATS = {
    "this store": (write_store, open_store),
    "safetensors, 2 files a clip": (write_safetensors, open_safetensors),
    "tar shards of .npy": (write_tar, open_tar),
    "np.memmap": (write_memmap, open_memmap),
}


def formats(root: Path, *, tiny: bool) -> list[dict]:
    """Random reads of every clip, warm, the formats taking turns; the median of the rounds."""
    number, shape, width = (6, (16, 2, 8, 8), 32) if tiny else (64, (16, 21, 60, 104), 4096)
    clips = [(latents_of(i, shape), embeds_of(i, width)) for i in range(number)]
    found: dict[str, dict] = {}
    for name, (write, _) in FORMATS.items():
        folder = root / name.replace(" ", "-")
        folder.mkdir()
        started = time.process_time()
        write(folder, clips)
        cpu = time.process_time() - started
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_blocks * 512 for path in files)
        found[name] = {
            "format": name, "write_cpu_ms": 1000 * cpu / number, "mb": size / number / 1e6,
            "files": len(files), "checked": name == "this store", "read": [],
        }  # fmt: skip
    for turn in range(1 if tiny else 5):
        order = random.Random(turn).sample(range(number), number)
        for name, (_, reopen) in FORMATS.items():
            read = reopen(root / name.replace(" ", "-"))
            started = time.process_time()
            for i in order:
                latents, embeds = read(i)
                latents.astype(np.float32)[0, 0, 0, 0], embeds.astype(np.float32)[0, 0]
            found[name]["read"].append(1000 * (time.process_time() - started) / number)
            assert np.array_equal(read(0)[0], clips[0][0])
    for row in found.values():
        row["read_cpu_ms"] = float(np.median(row.pop("read")))
    return list(found.values())


# --- kills ---


def write_until_killed(cache: Path, first: int, log: Path) -> None:
    """Note each row once the writer has it; no more of them than a segment can be lost."""
    with log.open("a", buffering=1) as notes, writer(cache, "latents", (16, 2, 8, 8), 8) as one:
        for i in range(first, first + 10**6):
            one.add(f"{i:064x}", latents_of(i, (16, 2, 8, 8)))
            notes.write(f"{i:064x}\n")


def kills(root: Path, *, tiny: bool) -> list[dict]:
    """SIGKILL at random moments; every row that is valid afterwards is compared with its own."""
    result = []
    context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")
    for writers in (1, 2):
        cache, log = root / f"kills-{writers}", root / f"log-{writers}"
        rng, lost, wrong, before = random.Random(writers), 0, 0, set()
        rounds = 2 if tiny else 20
        for turn in range(rounds):
            started = [
                context.Process(target=write_until_killed, args=(cache, 2000 * turn + 4 * w, log))
                for w in range(writers)
            ]
            for process in started:
                process.start()
            time.sleep(rng.uniform(0.05, 0.4))
            for process in started:
                os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
            reader = rows_of(cache, "latents")
            written = set(log.read_text().split()) if log.exists() else set()
            wrong += sum(
                not np.array_equal(reader.read(key), latents_of(int(key, 16), (16, 2, 8, 8)))
                for key in reader.rows.keys() - before
            )
            before = set(reader.rows)
            lost = len(written - before)
        result.append(
            {"writers": writers, "kills": rounds * writers, "rows_encoded": len(written),
             "rows_valid": len(before), "lost": lost, "lost_per_kill": lost / rounds / writers,
             "wrong": wrong}
        )  # fmt: skip
    return result


SECTIONS = {"formats": formats, "kills": kills}

if __name__ == "__main__":
    figures.main(__doc__, SECTIONS)
