"""Files that are nasty or randomly damaged, the same for the same seed."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support import videos

KINDS = ("h264.mp4", "h264.mkv", "h264.ts", "hevc.mp4", "av1.webm", "vp9.webm", "mpeg4.avi",
         "mpeg2.mpg", "mjpeg.avi", "prores.mov", "wmv2.wmv", "flv1.flv", "gif.gif")  # fmt: skip

IMAGES = (".png", ".jpg", ".webp")


def originals(folder: Path) -> list[Path]:
    """Whole files of many kinds, the real videos among them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in KINDS:
        codec, setup = videos.KINDS[name]
        paths.append(videos.write_video(folder / name, codec=codec, num_frames=40, **setup))
    paths += videos.real_videos().values()
    noise = np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8)
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.fromarray(noise).save(folder / name)
        paths.append(folder / name)
    paths.append(videos.write_npz(folder / "a.npz"))
    return paths


def write_damaged(folder: Path, sources: list[Path], count: int, *, seed: int = 0) -> list[Path]:
    """Write damaged copies, each with a caption beside it; a folder for each way of damage."""
    contents = [(path.suffix, path.read_bytes()) for path in sources]
    written = []
    for index in range(count):
        draws = random.Random(f"{seed}:{index}")
        way = draws.choice(WAYS)
        suffix, data = draws.choice(contents)
        damaged = way(bytearray(data), draws, contents)
        name = way.__name__.strip("_")
        if draws.random() < 0.05:
            suffix = draws.choice(contents)[0]  # a name that lies
        kind = "stills" if suffix in IMAGES else "films"  # images beside films are not used
        path = folder / kind / name / f"{index:04d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damaged)
        path.with_suffix(".txt").write_text(f"{name} {index}")
        written.append(path)
    return written


def _flip_bits(data, draws, contents):
    for _ in range(draws.choice((1, 3, 30, 300))):
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    return data


def _damage_header(data, draws, contents):
    for _ in range(draws.randint(1, 20)):
        data[draws.randrange(min(len(data), 1500))] = draws.randrange(256)
    return data


def _damage_end(data, draws, contents):
    for _ in range(draws.randint(1, 40)):
        data[-1 - draws.randrange(min(len(data), 3000))] = draws.randrange(256)
    return data


def _extreme_numbers(data, draws, contents):
    for _ in range(draws.randint(1, 6)):
        at = draws.randrange(min(len(data), 4000))
        data[at : at + 4] = draws.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"))
    return data


def _truncate(data, draws, contents):
    return data[: draws.randrange(len(data))]


def _cut_the_start(data, draws, contents):
    return data[draws.randrange(len(data)) :]


def _zero_a_run(data, draws, contents):
    start, length = draws.randrange(len(data)), draws.choice((16, 512, 4096, 65536))
    data[start : start + length] = bytes(len(data[start : start + length]))
    return data


def _remove_a_run(data, draws, contents):
    start = draws.randrange(len(data))
    del data[start : start + draws.choice((1, 7, 512, 4096))]
    return data


def _repeat_a_run(data, draws, contents):
    start, length = draws.randrange(len(data)), draws.choice((64, 4096, 65536))
    return data[:start] + data[start : start + length] * draws.randint(2, 5) + data[start:]


def _shuffle_blocks(data, draws, contents):
    size = max(64, len(data) // 16)
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    tail = blocks[1:]
    draws.shuffle(tail)
    return b"".join([blocks[0], *tail])


def _splice(data, draws, contents):
    other = draws.choice(contents)[1]
    return data[: draws.randrange(len(data))] + other[draws.randrange(len(other)) :]


def _random_bytes(data, draws, contents):
    return data[: draws.choice((0, 4, 64))] + draws.randbytes(draws.choice((0, 1, 100, 20_000)))


WAYS: tuple[Callable, ...] = (
    _flip_bits, _flip_bits, _damage_header, _damage_end, _extreme_numbers, _truncate,
    _cut_the_start, _zero_a_run, _remove_a_run, _repeat_a_run, _shuffle_blocks, _splice,
    _random_bytes,
)  # fmt: skip
