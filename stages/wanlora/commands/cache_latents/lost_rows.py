"""Rows of a view that the store has lost: encoded again, for `inspect --repair`.

Owns: the choice of these rows, and the refusal of manifests or a model that give other rows.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from wanlora.commands.cache_latents import plan as planning
from wanlora.commands.cache_latents import preflight
from wanlora.commands.cache_latents.clip_keys import Failure, failures_of
from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.find_encoders import find_encoders
from wanlora.commands.cache_latents.launch import encode_missing
from wanlora.commands.cache_latents.plan import Plan
from wanlora.commands.cache_latents.sources import find_moved_sources
from wanlora.commands.cache_latents.worker import encode_share
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import StoreError
from wanlora.store.views import View

log = logging.getLogger(__name__)


def encode_rows(
    view: View,
    settings: EncodeSettings,
    *,
    manifests: Sequence[Path],
    source_root: Sequence[Path],
    missing: Mapping[Kind, Collection[str]],
) -> tuple[int, list[Failure]]:
    """Encode rows of a view again that the store has lost; the view stays as it is.

    Other clips of the manifests are ignored, whether they can be used or not.

    Args:
        view: The view.
        settings: Settings that give the view's fingerprints, from `encode_settings.of_view`.
        manifests: Paths of the manifests that the view was made from.
        source_root: Folders to search for sources that were moved.
        missing: Keys of the rows to encode, by kind.

    Returns:
        Number of rows encoded, and the clips that could not be encoded. Rows that the manifests do
        not name are in neither; they are logged.

    Raises:
        StoreError: The manifests, the model or the device give none of these rows.
    """
    cache = settings.cache
    found, _ = preflight.read_manifests(manifests, source_root)
    preflight.require_known_model(settings.model)
    found, hashes = find_moved_sources(found, cache=cache, manifests=manifests, roots=source_root)
    plan = planning.make_plan(
        found,
        cache=cache,
        encoders=find_encoders(settings, hashes),
        hashes=hashes,
        more_prompts=[prompt.prompt for prompt in view.validation_prompts],
        threads=settings.decode_threads,
    )
    plan = _only(planning.find_missing(cache, plan), view, cache, manifests, missing)
    encoded = encode_missing(cache, plan, hashes, partial(encode_share, settings))
    lacking = {keyed.key: keyed for clips in plan.missing_clips.values() for keyed in clips}
    failures = failures_of(list(lacking.values()), encoded.failures)
    num_rows = encoded.prompts.rows + sum(each.rows for each in encoded.clips.values())
    return num_rows, failures


def _only(
    plan: Plan,
    view: View,
    cache: Location,
    manifests: Sequence[Path],
    missing: Mapping[Kind, Collection[str]],
) -> Plan:
    """Reduce a plan to the given rows of a view.

    Raises:
        StoreError: It has none of them, or other fingerprints.
    """
    wanted = {kind: set(keys) for kind, keys in missing.items() if keys}
    other_encoder = any(
        kind not in plan.encoders.kinds or plan.encoders.fingerprint(kind) != view.fingerprint(kind)
        for kind in wanted
    )
    plan = plan.only(wanted)
    found = {kind: keys for kind, keys in plan.missing_keys.items() if kind in wanted}
    num_lacking, num_rows = (sum(map(len, rows.values())) for rows in (wanted, found))
    named = (
        f"of the {num_lacking} rows that it lacks ({', '.join(wanted)}), "
        f"{', '.join(map(str, manifests))} names {num_rows}"
    )
    if other_encoder or not num_rows:
        raise StoreError(
            f"{named}{', for another encoder' if other_encoder else ''}: the manifests, the model "
            "or the device are not the original ones. Set them with --manifest and --device, "
            f"or make the view again: wanlora cache-latents --cache {cache} --view {view.name}"
        )
    if num_rows < num_lacking:
        log.warning("view %r: %s; these are encoded", view.name, named)
    return plan
