"""Cuts of a video into clips. Pure functions.

Owns: the modes chunk, head, middle, slide and uniform, and the trimming of short scenes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Mode = Literal["chunk", "head", "middle", "slide", "uniform"]


class Cut(NamedTuple):
    """A clip inside a video."""

    start_s: float
    num_frames: int


class Scene(NamedTuple):
    """A part of a video without a scene cut, and the frames it holds at the clip's fps."""

    start_s: float
    available: int


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules of the cuts.

    Attributes:
        num_frames: Frames of a clip, 4k+1.
        fps: Frames per second of a clip.
        stride: Frames from one clip's start to the next, for slide.
        count: Clips per video, for uniform.
        short: Treatment of a scene shorter than a clip: trim or skip.
        min_frames: Minimum frames of a trimmed clip.
        lengths: Numbers of frames that a trimmed clip may have.
    """

    num_frames: int
    fps: float
    mode: Mode
    stride: int
    count: int
    short: Literal["trim", "drop"]
    min_frames: int
    lengths: Sequence[int]


def cuts(scenes: Sequence[Scene], rules: Rules) -> list[Cut]:
    """Cut a video into clips, none across two scenes; no clip if every scene is too short."""
    return sorted(_MODES[rules.mode](scenes, rules))


def trimmed(available: int, rules: Rules) -> int:
    """Number of frames of a clip trimmed from a short scene; 0 for none."""
    if rules.short == "drop":
        return 0
    longest = min(available, rules.num_frames)
    return max((n for n in rules.lengths if rules.min_frames <= n <= longest), default=0)


def shortest(rules: Rules) -> int:
    """Minimum number of frames of a scene with a clip."""
    if rules.short == "drop":
        return rules.num_frames
    return min((n for n in rules.lengths if n >= rules.min_frames), default=rules.num_frames)


def unique_ids(names: Sequence[str]) -> list[str]:
    """Number equal names from the second one on: a, a-2, a-3."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return unique


def _chunk(scenes: Sequence[Scene], rules: Rules) -> list[Cut]:
    """Cut every scene into consecutive clips."""
    return _stepped(scenes, rules, rules.num_frames)


def _slide(scenes: Sequence[Scene], rules: Rules) -> list[Cut]:
    """Cut a clip every `stride` frames in every scene; clips overlap if a stride is shorter."""
    return _stepped(scenes, rules, rules.stride)


def _stepped(scenes: Sequence[Scene], rules: Rules, step: int) -> list[Cut]:
    found = []
    for scene in scenes:
        if scene.available < rules.num_frames:
            found += _short(scene, rules)
            continue
        offsets = range(0, scene.available - rules.num_frames + 1, step)
        found += [_cut(scene, offset, rules) for offset in offsets]
    return found


def _head(scenes: Sequence[Scene], rules: Rules) -> list[Cut]:
    """Cut the start of the first scene that is long enough; else trim the longest scene."""
    for scene in scenes:
        if scene.available >= rules.num_frames:
            return [_cut(scene, 0, rules)]
    return _short(_longest(scenes), rules)


def _middle(scenes: Sequence[Scene], rules: Rules) -> list[Cut]:
    """Cut one clip from the middle of the longest scene."""
    scene = _longest(scenes)
    length = min(rules.num_frames, scene.available)
    if length < rules.num_frames:
        length = trimmed(scene.available, rules)
    if not length:
        return []
    offset = (scene.available - length) // 2
    return [Cut(scene.start_s + offset / rules.fps, length)]


def _uniform(scenes: Sequence[Scene], rules: Rules) -> list[Cut]:
    """Cut `count` clips, with starts spread evenly over all possible starts."""
    starts = [
        (scene, offset)
        for scene in scenes
        for offset in range(scene.available - rules.num_frames + 1)
    ]
    if not starts:
        return _short(_longest(scenes), rules)
    last, gaps = len(starts) - 1, max(1, rules.count - 1)
    places = sorted({(2 * k * last + gaps) // (2 * gaps) for k in range(rules.count)})
    return [_cut(*starts[place], rules) for place in places]


def _cut(scene: Scene, offset: int, rules: Rules) -> Cut:
    return Cut(scene.start_s + offset / rules.fps, rules.num_frames)


def _short(scene: Scene, rules: Rules) -> list[Cut]:
    length = trimmed(scene.available, rules)
    return [Cut(scene.start_s, length)] if length else []


def _longest(scenes: Sequence[Scene]) -> Scene:
    return max(scenes, key=lambda scene: scene.available)


_MODES: dict[Mode, Callable[[Sequence[Scene], Rules], list[Cut]]] = {
    "chunk": _chunk,
    "head": _head,
    "middle": _middle,
    "slide": _slide,
    "uniform": _uniform,
}
