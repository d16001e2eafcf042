"""The view that a run publishes, once every row of it is committed.

Owns: making a view from keyed clips, the clips that stay in it although they fail now, and the
warning before a view of another model is replaced.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wanlora.commands.cache_latents.clip_keys import Failure, KeyedClip
from wanlora.commands.cache_latents.plan import Plan
from wanlora.commands.cache_latents.segments import write_missing_groups
from wanlora.core.location import Location
from wanlora.core.prompts import prompt_key
from wanlora.data.clip import Clip
from wanlora.errors import StoreError
from wanlora.store import index
from wanlora.store.reader import StoreReader
from wanlora.store.views import (
    Encoding,
    View,
    ViewClip,
    ViewPrompt,
    read_header,
    read_view,
    view_names,
    write_view,
)
from wanlora.wan.model_folder import MICRO

log = logging.getLogger(__name__)


def make_view(
    name: str,
    plan: Plan,
    clips: Sequence[KeyedClip],
    *,
    model: str,
    validation_prompts: Sequence[str],
) -> View:
    """Describe the clips of a view and their rows.

    Args:
        name: Name of the view.
        plan: The plan that the clips are from.
        clips: Clips of the view.
        model: Name of the model, as it was given.
        validation_prompts: Prompts for previews of training.
    """
    encoders, variant = plan.encoders, plan.encoders.variant
    return View(
        encodings={
            kind: Encoding.of(provenance) for kind, provenance in encoders.provenances.items()
        },
        model=_portable(model, encoders.folder),
        variant=variant.name,
        shift=variant.defaults.shift,
        empty_prompt=prompt_key(""),
        negative_prompt=prompt_key(variant.defaults.negative_prompt),
        validation_prompts=tuple(ViewPrompt(text, prompt_key(text)) for text in validation_prompts),
        clips=tuple(
            ViewClip(
                clip_id=keyed.clip.clip_id,
                key=keyed.key,
                bucket=keyed.clip.bucket,
                prompts=tuple(prompt_key(text) for text in keyed.clip.prompts),
                activity=keyed.clip.activity,
                split=keyed.clip.split,
                source_group=keyed.clip.source_group,
                fps=keyed.clip.fps,
                weight=keyed.clip.weight,
            )
            for keyed in clips
        ),
        name=name,
    )


def _portable(model: str, folder: Path) -> str:
    """Name of the model that is valid from any working directory."""
    return str(folder) if model != MICRO and Path(model).expanduser().is_dir() else model


def warn_of_replaced_view(cache: Location, view: View) -> None:
    """Warn if the view of this name has another model or other encodings, and name a free name.

    Args:
        cache: Cache folder or URL.
        view: The view that will be written.
    """
    found = read_header(cache, view.name)
    if found is None or (found.model, found.encodings) == (view.model, view.encodings):
        return
    short, taken = "i2v" if "cond_latents" in view.kinds else "t2v", view_names(cache)
    names = (short, view.variant, *(f"{view.variant}-{number}" for number in range(2, 99)))
    log.warning(
        "view %r of %s (%s) will be replaced by one of %s (%s), and runs that train on it can then "
        "not be resumed. To keep both views, which share their rows, add --view %s to the command",
        view.name, found.model, ", ".join(found.kinds), view.model, ", ".join(view.kinds),
        next(name for name in names if name not in taken),
    )  # fmt: skip


def unchanged_clips(
    cache: Location, view: str, plan: Plan, clips: Sequence[Clip], failures: Sequence[Failure]
) -> list[ViewClip]:
    """Clips that fail now and are in the view that will be replaced: they stay in it.

    A disk that does not answer for a moment would otherwise make the view smaller. Their activity,
    split, source group and weight are those of the manifests.

    Args:
        cache: Cache folder or URL.
        view: Name of the view.
        plan: The fingerprints; other encoders have no row for these clips.
        clips: Clips of the manifests.
        failures: Clips that cannot be used now.
    """
    ids = {failure.clip_id for failure in failures}
    failed = {clip.clip_id: clip for clip in clips if clip.clip_id in ids}
    if not failed or view not in view_names(cache):
        return []
    try:
        replaced = read_view(cache, view)
    except StoreError as error:
        log.warning("the view that is replaced cannot be read: %s", error)
        return []
    candidates = tuple(old for old in replaced.clips if old.clip_id in failed)
    few = replace(replaced, clips=candidates)
    gone = {
        key
        for kind in plan.encoders.kinds
        for key in index.missing_keys(cache, kind, plan.encoders.fingerprint(kind), few.keys(kind))
    }
    return [
        replace(
            old, activity=now.activity, split=now.split, source_group=now.source_group,
            weight=now.weight,
        )
        for old in candidates
        if gone.isdisjoint({old.key, *old.prompts}) and (now := failed[old.clip_id])
    ]  # fmt: skip


def publish(
    cache: Location,
    view: View,
    plan: Plan,
    clips: Sequence[KeyedClip],
    unchanged: Sequence[ViewClip],
) -> View:
    """Write a view, after a check that every row of it is committed.

    Args:
        cache: Cache folder or URL.
        view: The view of `clips`, from `make_view`.
        plan: Encoders of the rows.
        clips: Usable clips of the plan.
        unchanged: More clips of the view, from `unchanged_clips`.

    Raises:
        StoreError: A row is not committed, or the cache cannot be written.
    """
    view = replace(view, clips=(*unchanged, *view.clips))
    write_missing_groups(cache, plan.encoders, clips)
    reader = StoreReader.of_view(cache, view)
    written = write_view(cache, view.name, view)
    try:
        reader.keep_index()
    except StoreError as error:  # the index only saves time
        log.warning("the index is not kept: %s", error)
    return written
