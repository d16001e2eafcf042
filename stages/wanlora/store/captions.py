"""Prompts taken from a cache: the captions of a view by activity.

Owns: the choice of the clips whose captions are used.
"""

import logging
from collections import Counter
from collections.abc import Iterable

from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip, no_such_split

logger = logging.getLogger(__name__)


def captions(reader: StoreReader, view: View, split: str) -> dict[str, dict[str, str]]:
    """Map each activity to its captions (text to key), in the view's order, without repeats.

    If an activity has no clips in the split, its captions come from the other split. A warning
    names it, because those captions may have been trained on.

    Args:
        reader: Reader of this view.
        view: View with the clips.
        split: Split of the captions.

    Raises:
        StoreError: The split has no clips.
    """
    chosen = {clip.activity for clip in view.clips if clip.split == split}
    if not chosen:
        raise no_such_split(view, split)
    asked = [clip for clip in view.clips if clip.split == split or clip.activity not in chosen]
    texts = reader.prompts(key for clip in asked for key in clip.prompts)
    found: dict[str, dict[str, str]] = {}
    for clip in asked:
        for key in clip.prompts:
            found.setdefault(clip.activity, {}).setdefault(texts[key], key)
    if lacking := sorted(found.keys() - chosen):
        logger.warning(
            "no clips of split %r show %s: prompts for it are captions of clips that may have been "
            "trained on", split, ", ".join(lacking),
        )  # fmt: skip
    return found


def clips_of(view: View, split: str, prompts: Iterable[tuple[str, str | None]]) -> list[ViewClip]:
    """Select a clip for each prompt: one that has it as a caption, of the split if possible.

    Several prompts with one caption get its clips in turn, in the view's order.

    Args:
        view: View with the clips.
        split: Split of the captions.
        prompts: Activity, and key of a caption of the activity, of each; None = any caption.
    """
    known: dict[tuple[str, str | None], list[ViewClip]] = {}
    for clip in sorted(view.clips, key=lambda clip: clip.split != split):
        for key in (*clip.prompts, None):
            known.setdefault((clip.activity, key), []).append(clip)
    used: Counter[tuple[str, str | None]] = Counter()
    found = []
    for prompt in prompts:
        clips = known[prompt]
        held_out = [clip for clip in clips if clip.split == split] or clips
        found.append(held_out[used[prompt] % len(held_out)])
        used[prompt] += 1
    return found
