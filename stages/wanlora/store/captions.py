"""The captions of a view by activity: what is asked for when a cache decides the prompts.

Owns: which clips' captions those are.
"""

import logging

from wanlora.store.reader import StoreReader
from wanlora.store.views import View, no_such_split

logger = logging.getLogger(__name__)


def captions(reader: StoreReader, view: View, split: str) -> dict[str, dict[str, str]]:
    """Text to key of the captions of each activity, in the view's order, each once.

    An activity without clips in the split is asked for with its other captions, and named in a
    warning: they may have been trained on.

    Args:
        reader: Of this view.
        view: Whose clips.
        split: Whose captions.

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
