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
        clips: Result of encoding clips.
        clips_twice: Superfluous copies of rows of latents, made by two workers at once.
        workers: Number of workers.
    """

    prompts: EncodedPrompts = field(default_factory=EncodedPrompts)
    clips: EncodedClips = field(default_factory=EncodedClips)
    clips_twice: int = 0
    workers: int = 1


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
    rows = max(1, sum(each.clips.rows for each in made))
    return Encoded(
        prompts=EncodedPrompts(
            rows=sum(each.prompts.rows for each in made),
            truncated=sorted({text for each in made for text in each.prompts.truncated}),
        ),
        clips=EncodedClips(
            rows=sum(each.clips.rows for each in made),
            failures={key: why for each in made for key, why in each.clips.failures.items()},
            seconds=max((each.clips.seconds for each in made), default=0.0),
            stall=sum(each.clips.stall * each.clips.rows for each in made) / rows,
        ),
        workers=workers,
    )


def reconcile(cache: Location, plan: Plan, made: Encoded) -> Encoded:
    """Correct the results of workers by the store, which also has the rows of workers that died.

    Rows are those that the plan lacked and that are committed now; a committed row did not fail.
    """
    text = CommittedRows(cache, "text", plan.fingerprint("text")).look()
    wanted = {keyed.key for keyed in plan.missing_clips}
    rows = CommittedRows(cache, "latents", plan.fingerprint("latents")).look()
    there = rows.present(wanted)
    failures = {key: why for key, why in made.clips.failures.items() if key not in there}
    return replace(
        made,
        prompts=replace(made.prompts, rows=len(text.present(plan.missing_prompts))),
        clips=replace(made.clips, rows=len(there), failures=failures),
        clips_twice=rows.repeats(wanted),
    )


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
) -> EncodedClips:
    missing = {keyed.key: keyed.clip for keyed in plan.missing_clips}
    if not missing:
        return EncodedClips()
    with shown_progress(len(missing), "latents", "clip", shown=shown, on_rows=on_rows) as progress:
        chunks, there = _chunks(
            settings, plan, "latents", missing, rank, attrgetter("bucket"), progress
        )
        return encode_clips(
            settings,
            plan.encoders,
            chunks,
            progress,
            largest_clip_bytes=plan.largest_clip_bytes,
            committed=there,
            decode_clip=decode_clip,
        )


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
    there = CommittedRows(settings.cache, kind, plan.fingerprint(kind))
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
        wanted: dict[Kind, set[str]] = {
            "text": set(plan.missing_prompts),
            "latents": {keyed.key for keyed in plan.missing_clips},
        }
        self.total = sum(map(len, wanted.values()))
        self._plan = plan
        self._wanted = wanted
        self._committed = {
            kind: CommittedRows(cache, kind, plan.fingerprint(kind)) for kind in wanted
        }

    def count(self) -> int:
        """Number of rows that are committed."""
        return sum(
            len(rows().present(self._wanted[kind])) for kind, rows in self._committed.items()
        )

    def left(self) -> Plan:
        """The plan without the rows that are committed."""
        text, latents = self._committed["text"].look(), self._committed["latents"].look()
        prompts = self._plan.missing_prompts.items()
        return replace(
            self._plan,
            missing_prompts={key: prompt for key, prompt in prompts if key not in text},
            missing_clips=tuple(k for k in self._plan.missing_clips if k.key not in latents),
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
