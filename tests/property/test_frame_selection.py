"""Frame selection against its definition, for any spacing of frames."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import videos
from wanlora.media import decode

GAPS_MS = st.lists(st.integers(min_value=4, max_value=300), min_size=3, max_size=24)


@settings(max_examples=25, deadline=None)
@given(gaps=GAPS_MS, start=st.floats(0, 1), fps=st.sampled_from([8.0, 16.0, 23.976, 30.0]))
def test_output_k_is_the_last_frame_that_starts_by_its_time(tmp_path_factory, gaps, start, fps):
    times = [sum(gaps[:k]) for k in range(len(gaps))]
    path = videos.write_video(
        tmp_path_factory.mktemp("vfr") / "a.mkv",
        num_frames=len(times),
        times_ms=times,
        height=32,
        width=80,
    )
    start_s = start * times[-1] / 1000
    count = max(1, int((times[-1] / 1000 - start_s) * fps))
    found = decode.decode(path, start_s=start_s, fps=fps, num_frames=count)
    slack = Fraction(1, 2000)  # a timestamp in ms is within half a ms of the truth
    wanted = [
        max(
            index
            for index, time in enumerate(times)
            if Fraction(time, 1000) <= Fraction(start_s) + k / Fraction(fps) + slack
        )
        for k in range(count)
    ]
    assert [videos.number_in(frame) for frame in found] == wanted
