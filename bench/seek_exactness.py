"""Is every frame after every seek the one that reading from the start gives?

python bench/seek_exactness.py generated       every kind that has an encoder here
python bench/seek_exactness.py FILE...         any video, against reading it whole
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support import videos
from wanlora.errors import MediaError
from wanlora.media import decode, probe

COUNT = 3


def generated(num_frames: int = 120) -> None:
    seeks = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, (codec, setup) in videos.KINDS.items():
            path = videos.write_video(
                Path(folder, name), num_frames=num_frames, codec=codec, **setup
            )
            for first in range(num_frames - COUNT + 1):
                cut = decode.decode(path, start_s=first / 25, fps=25, num_frames=COUNT)
                found = [videos.number_in(frame) for frame in cut]
                seeks += 1
                wrong += found != list(range(first, first + COUNT))
    print(f"{len(videos.KINDS)} files x {num_frames - COUNT + 1} seeks x {COUNT} frames: "
          f"{seeks - wrong} of {seeks} exact")  # fmt: skip


def real(paths: list[Path]) -> None:
    for path in paths:
        try:
            found = probe.scan(path, detector="builtin")
        except MediaError as error:
            print(f"{path.name:28} {error.code}: {error}")
            continue
        available = found.timeline.parts((), 16)[0].available
        whole = decode.decode(path, start_s=0, fps=16, num_frames=available)
        starts = range(0, available - COUNT + 1, max(1, available // 40))
        wrong = sum(
            not np.array_equal(
                decode.decode(path, start_s=k / 16, fps=16, num_frames=COUNT), whole[k : k + COUNT]
            )
            for k in starts
        )
        info = found.info
        print(f"{path.name:28} {info.codec:8} {info.width}x{info.height} {found.num_frames} frames "
              f"{found.fps:.2f} fps {found.span_s:.2f} s, cuts {len(found.cuts_s)}: "
              f"{len(starts) - wrong} of {len(starts)} seeks exact")  # fmt: skip


if __name__ == "__main__":
    generated() if sys.argv[1:] == ["generated"] else real([Path(p) for p in sys.argv[1:]])
