"""The work of one worker: all missing rows, or a rank's share of them.

Owns: the order of prompts and clips, and the report of a worker. Local processes, ranks of torchrun
and srun, and Ray actors all run `encode_share`.
"""

import socket
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

from wanlora.commands.cache_latents.claims import CommittedRows, all_in_groups, claim_chunks
from wanlora.commands.cache_latents.clip_keys import Failure
from wanlora.commands.cache_latents.encode_clips import DecodeClip, EncodedClips, encode_clips
from wanlora.commands.cache_latents.encode_prompts import (
    EncodedPrompts,
    Progress,
    encode_prompts,
)
from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.find_encoders import Encoders, find_encoders
from wanlora.commands.cache_latents.frames import decode
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.commands.cache_latents.plan import Plan
from wanlora.core.fingerprint import difference
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import ModelError
from wanlora.processes.ranks import ALONE, Rank
from wanlora.progress import bar, show_figures

T = TypeVar("T")
OnRows = Callable[[int], None] | None

PROMPTS_WORTH_LOADING = 64
"""Minimum number of prompts for a worker to load UMT5: loading takes longer than encoding fewer."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Result of workers.

    Attributes:
        prompts: Result of encoding prompts.
        clips: Result of encoding clips, by kind of row.
        workers: Number of workers.
    """

    prompts: EncodedPrompts = field(default_factory=EncodedPrompts)
    clips: Mapping[Kind, EncodedClips] = field(default_factory=dict)
    workers: int = 1

    @property
    def failures(self) -> dict[str, Failure]:
        """Reason why a clip lacks a row of some kind, by clip key."""
        return {key: why for each in self.clips.values() for key, why in each.failures.items()}


def encode_share(
    settings: EncodeSettings,
    plan: Plan,
    rank: Rank = ALONE,
    *,
    shown: bool = True,
    on_rows: OnRows = None,
    decode_clip: DecodeClip | None = None,
) -> Encoded:
    """Encode missing rows in this process; as a rank, until every row is committed or failed.

    If there are few prompts, the first rank encodes them: another would load UMT5 for longer than
    it encodes. The others encode clips first, and then the prompts that are still missing.

    Args:
        settings: The cache, the types and the limits.
        plan: The missing rows, and the encoders of this process.
        rank: Rank of this process.
        shown: True to show progress.
        on_rows: Called with the number of rows, whenever some are done.
        decode_clip: Decodes a clip; None decodes in this process.
    """
    shown = shown and rank.index == 0
    decode_clip = decode_clip or partial(decode, known=dict(plan.sources))
    few = len(plan.missing_prompts) < PROMPTS_WORTH_LOADING * rank.world
    if rank.index and few:
        clips = _clips(settings, plan, rank, decode_clip, shown=shown, on_rows=on_rows)
        prompts = _prompts(settings, plan, rank, shown=shown, on_rows=on_rows)
    else:
        prompts = _prompts(settings, plan, ALONE if few else rank, shown=shown, on_rows=on_rows)
        clips = _clips(settings, plan, rank, decode_clip, shown=shown, on_rows=on_rows)
    if rank.world == 1:
        return Encoded(prompts, clips)
    return reconcile(settings.cache, plan, Encoded(prompts, clips, workers=rank.world))


def merge(made: Sequence[Encoded], *, workers: int) -> Encoded:
    """Merge the results of several workers."""
    kinds = dict.fromkeys(kind for each in made for kind in each.clips)
    return Encoded(
        prompts=EncodedPrompts(
            rows=sum(each.prompts.rows for each in made),
            truncated=sorted({text for each in made for text in each.prompts.truncated}),
        ),
        clips={
            kind: _merge_clips([each.clips[kind] for each in made if kind in each.clips])
            for kind in kinds
        },
        workers=workers,
    )


def _merge_clips(made: Sequence[EncodedClips]) -> EncodedClips:
    rows = sum(each.rows for each in made)
    return EncodedClips(
        rows=rows,
        failures={key: why for each in made for key, why in each.failures.items()},
        seconds=max(each.seconds for each in made),
        stall=sum(each.stall * each.rows for each in made) / max(1, rows),
    )


def reconcile(cache: Location, plan: Plan, made: Encoded) -> Encoded:
    """Correct the results of workers by the store, which also has the rows of workers that died.

    Rows are those that the plan lacked and that are committed now; a committed row did not fail.
    """
    clips = {}
    missing = plan.missing_keys
    for kind in plan.missing_clips:
        rows = CommittedRows(cache, kind, plan.encoders.fingerprint(kind)).look()
        there, own = rows.present(missing[kind]), made.clips.get(kind, EncodedClips())
        failures = {key: why for key, why in own.failures.items() if key not in there}
        twice = rows.repeats(missing[kind])
        clips[kind] = replace(own, rows=len(there), failures=failures, twice=twice)
    text = CommittedRows(cache, "text", plan.encoders.fingerprint("text")).look()
    num_prompts = len(text.present(plan.missing_prompts))
    return replace(made, prompts=replace(made.prompts, rows=num_prompts), clips=clips)


def require_same_encoders(
    settings: EncodeSettings, wanted: Encoders, *, local_rank: int = 0
) -> Encoders:
    """Find this worker's model and device, and refuse those that would make other rows.

    Raises:
        ModelError: Its weights, or the arithmetic of its device, are not those of the plan.
    """
    here = find_encoders(settings, Hashes.read(settings.cache), local_rank=local_rank)
    different = [
        line
        for kind, provenance in wanted.provenances.items()
        for line in difference(provenance, here.provenances.get(kind, {}))
    ]
    if different:
        raise ModelError(
            f"the worker on {socket.gethostname()}, {here.device}, would not encode as the others: "
            f"{'; '.join(different)}. Give every machine the same model, and GPUs that agree on "
            "TF32 (or --set tf32=false)"
        )
    return here


def _prompts(
    settings: EncodeSettings, plan: Plan, rank: Rank, *, shown: bool, on_rows: OnRows
) -> EncodedPrompts:
    missing = plan.missing_prompts
    if not missing:
        return EncodedPrompts()
    with shown_progress(
        len(missing), "prompts", "prompt", shown=shown, on_rows=on_rows
    ) as progress:
        chunks, there = _chunks(settings, plan, "text", missing, rank, lambda _: 0, progress)
        return encode_prompts(settings, plan.encoders, chunks, progress, committed=there)


def _clips(
    settings: EncodeSettings,
    plan: Plan,
    rank: Rank,
    decode_clip: DecodeClip,
    *,
    shown: bool,
    on_rows: OnRows,
) -> dict[Kind, EncodedClips]:
    """Encode the clips of each kind; one that failed is not tried again for the next kind."""
    made: dict[Kind, EncodedClips] = {}
    for kind, clips in plan.missing_clips.items():
        failed = Encoded(clips=made).failures
        missing = {keyed.key: keyed.clip for keyed in clips if keyed.key not in failed}
        if not missing:
            continue
        with shown_progress(len(missing), kind, "clip", shown=shown, on_rows=on_rows) as progress:
            chunks, there = _chunks(
                settings, plan, kind, missing, rank, attrgetter("bucket"), progress
            )
            made[kind] = encode_clips(
                settings,
                plan.encoders,
                kind,
                chunks,
                progress,
                largest_clip_bytes=plan.largest_clip_bytes(kind),
                committed=there,
                decode_clip=decode_clip,
            )
    return made


def _chunks(
    settings: EncodeSettings,
    plan: Plan,
    kind: Kind,
    missing: Mapping[str, T],
    rank: Rank,
    group_of: Callable[[T], Any],
    progress: Progress,
) -> tuple[Iterator[dict[str, T]], Callable[[], Container[str]]]:
    """Chunks of a rank, and the rows that others have committed; none if the process is alone."""
    if rank.world == 1:
        return all_in_groups(missing, group_of=group_of), frozenset
    there = CommittedRows(settings.cache, kind, plan.encoders.fingerprint(kind))
    chunks = claim_chunks(
        missing,
        rank,
        there,
        max_rows=settings.rows_per_segment,
        group_of=group_of,
        on_committed=lambda rows: progress(rows, ""),
        look=there.look,
    )
    return chunks, there


class CommittedOfPlan:
    """Rows of a plan that are committed now, of all workers.

    Args:
        cache: Cache folder or URL.
        plan: The rows that were missing.

    Attributes:
        total: Number of rows that the plan lacked.
    """

    def __init__(self, cache: Location, plan: Plan) -> None:
        self._plan = plan
        self._wanted = plan.missing_keys
        self.total = sum(map(len, self._wanted.values()))
        self._committed = {
            kind: CommittedRows(cache, kind, plan.encoders.fingerprint(kind))
            for kind in self._wanted
        }

    def count(self) -> int:
        """Number of rows that are committed."""
        return sum(
            len(rows().present(self._wanted[kind])) for kind, rows in self._committed.items()
        )

    def left(self) -> Plan:
        """The plan without the rows that are committed."""
        return self._plan.only(
            {
                kind: self._wanted[kind] - rows.look().present(self._wanted[kind])
                for kind, rows in self._committed.items()
            }
        )


def for_workers(plan: Plan) -> Plan:
    """Remove the parts of a plan that workers in other processes do not need."""
    return replace(plan, clips=(), failures=(), prompts={})


@contextmanager
def shown_progress(
    total: int, what: str, unit: str, *, shown: bool, on_rows: OnRows = None
) -> Iterator[Progress]:
    """Yield a function that advances a bar, and shows a note beside it."""
    with bar(total=total, description=what, unit=unit, shown=shown) as progress:

        def update(rows: int, note: str) -> None:
            if note:
                show_figures(progress, note)
            progress.update(rows)
            if on_rows:
                on_rows(rows)

        yield update
