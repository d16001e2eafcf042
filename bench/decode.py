"""CPU-seconds to load one 81-frame 480x832 clip: ours, torchcodec and decord, and their frames.

python bench/decode.py [ROUNDS]    torchcodec and decord are measured where they are installed

Each decoder takes the frames that are on screen at start + k/16 s of a 25 fps H.264 video, one
thread, and all share the resize. Frames carry their number, so a wrong frame is counted. Needs
torch, av and the imports of `wanlora.data.clip_frames`; PYTHONPATH=stages does without an
installation.
"""

import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support import videos
from wanlora.data.clip import Clip
from wanlora.data.clip_frames import load_clip
from wanlora.media import decode
from wanlora.media.transform import resize_and_crop

FPS, NUM_FRAMES, HEIGHT, WIDTH = 16.0, 81, 480, 832
STARTS_S = (0.0, 3.1, 9.7)
SOURCE_FPS, SOURCE_FRAMES = 25, 400


def write_source(path: Path, height: int, width: int) -> None:
    """Real pictures, enlarged and drifting, with the frame's number across the top."""
    with av.open(str(videos.real_videos()["bigbuckbunny"])) as reader:
        frames = itertools.islice(reader.decode(video=0), 60)
        pictures = [f.to_ndarray(format="rgb24", width=width + 64, height=height) for f in frames]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=SOURCE_FPS, options={"crf": "20"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.max_b_frames, stream.codec_context.gop_size = 3, 100
        for number in range(SOURCE_FRAMES):
            drift = number % 64
            pixels = pictures[number % 60][:, drift : drift + width].copy()
            label = videos.numbered_frame(number, height=height, width=width)
            pixels[: height // 4] = label[: height // 4]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def ours(path: Path, start_s: float) -> torch.Tensor:
    clip = Clip(
        "c", str(path), None, "g", "video", start_s, FPS, NUM_FRAMES, HEIGHT, WIDTH, ("p",), "a",
        "train", {}, {"sample_aspect": "1"}, (), path,
    )  # fmt: skip
    return load_clip(clip)


def torchcodec(path: Path, start_s: float) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder  # noqa: PLC0415  optional

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
    begin = decoder.metadata.begin_stream_seconds
    times = [begin + start_s + k / FPS + 1e-4 for k in range(NUM_FRAMES)]
    return cover(decoder.get_frames_played_at(times).data.numpy())


def decord(path: Path, start_s: float) -> torch.Tensor:
    import decord as library  # noqa: PLC0415  optional

    reader = library.VideoReader(str(path), num_threads=1)
    shown = reader.get_frame_timestamp(range(len(reader)))[:, 0] - 1e-4
    times = shown[0] + 1e-4 + start_s + np.arange(NUM_FRAMES) / FPS
    indices = np.searchsorted(shown, times, side="right") - 1
    return cover(reader.get_batch(indices).asnumpy())


def cover(frames: np.ndarray) -> torch.Tensor:
    return torch.cat([resize_and_crop(f[None], height=HEIGHT, width=WIDTH) for f in frames])


def wrong_frames(pixels: torch.Tensor, start_s: float) -> int:
    expected = [int((start_s + k / FPS) * SOURCE_FPS + 1e-6) for k in range(NUM_FRAMES)]
    top = pixels[:, :, : HEIGHT // 2].permute(0, 2, 3, 1).numpy()
    found = [videos.number_in(frame) for frame in top]
    return sum(a != b for a, b in zip(found, expected, strict=True))


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    decoders = {"wanlora (PyAV)": ours}
    decoders |= {
        f.__name__: f for f in (torchcodec, decord) if importlib.util.find_spec(f.__name__)
    }
    with tempfile.TemporaryDirectory() as folder:
        for height, width in ((720, 1280), (1080, 1920)):
            path = Path(folder, f"{height}.mp4")
            write_source(path, height, width)
            times: dict[str, list[float]] = {name: [] for name in decoders}
            wrong = dict.fromkeys(decoders, 0)
            decode_only = []
            for _ in range(rounds):
                for start_s in STARTS_S:
                    for name, load in decoders.items():
                        begin = time.process_time()
                        pixels = load(path, start_s)
                        times[name].append(time.process_time() - begin)
                        wrong[name] += wrong_frames(pixels, start_s)
                    begin = time.process_time()
                    for _frame in decode.iter_frames(
                        path, start_s=start_s, fps=FPS, num_frames=NUM_FRAMES
                    ):
                        pass
                    decode_only.append(time.process_time() - begin)
            print(f"{width}x{height}, {rounds * len(STARTS_S)} clips each")
            for name, found in times.items():
                low, middle, high = min(found), statistics.median(found), max(found)
                print(f"  {name:15} {middle:.2f} CPU-s a clip ({low:.2f} to {high:.2f}), "
                      f"{wrong[name]} wrong frames")  # fmt: skip
            print(f"  of ours, decoding and RGB alone: {statistics.median(decode_only):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
