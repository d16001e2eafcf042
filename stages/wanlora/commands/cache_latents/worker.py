"""The work of one worker: everything that is missing, or a rank's share of it.

Owns: the order of prompts and clips, and the report of a worker. Local processes, ranks of torchrun
and srun, and actors of Ray all run `encode_share`.
"""

import socket
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

from wanlora.commands.cache_latents import plan as planning
from wanlora.commands.cache_latents.claims import Committed, claim_chunks, whole
from wanlora.commands.cache_latents.encode import (
    Decode,
    EncodedClips,
    EncodedPrompts,
    Progress,
    encode_clips,
    encode_prompts,
)
from wanlora.commands.cache_latents.frames import decode
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.commands.cache_latents.plan import Encoders, Plan
from wanlora.config import CacheLatentsConfig
from wanlora.core.fingerprint import difference
from wanlora.errors import ModelError
from wanlora.processes.ranks import ALONE, Rank
from wanlora.progress import bar, show_figures
from wanlora.store.schema import Kind

T = TypeVar("T")
OnRows = Callable[[int], None] | None

PROMPTS_WORTH_LOADING = 64
"""Prompts that it takes to make a worker load UMT5: loading takes longer than encoding so many."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What workers have made.

    Attributes:
        prompts: How encoding prompts went.
        clips: How encoding clips went.
        clips_twice: Copies too many of rows of latents, made by two workers at once.
        workers: How many there were.
    """

    prompts: EncodedPrompts = field(default_factory=EncodedPrompts)
    clips: EncodedClips = field(default_factory=EncodedClips)
    clips_twice: int = 0
    workers: int = 1


def encode_share(
    config: CacheLatentsConfig,
    plan: Plan,
    rank: Rank = ALONE,
    *,
    shown: bool = True,
    on_rows: OnRows = None,
    decoded_by: Decode | None = None,
) -> Encoded:
    """Encode what is missing, in this process; as a rank, until every row is committed or failed.

    If there are few prompts, the first rank encodes them: another would load UMT5 for longer than
    it encodes. The others encode clips first, and then the prompts that are still missing.

    Args:
        config: The settings.
        plan: What is missing, and the model to use.
        rank: This process among several.
        shown: Whether to show progress.
        on_rows: Called with the number of rows, whenever some are done.
        decoded_by: What decodes a clip; None = this process.
    """
    shown = shown and rank.index == 0
    decoded_by = decoded_by or partial(decode, known=dict(plan.sources))
    few = len(plan.missing_prompts) < PROMPTS_WORTH_LOADING * rank.world
    if rank.index and few:
        clips = _clips(config, plan, rank, decoded_by, shown=shown, on_rows=on_rows)
        prompts = _prompts(config, plan, rank, shown=shown, on_rows=on_rows)
    else:
        prompts = _prompts(config, plan, ALONE if few else rank, shown=shown, on_rows=on_rows)
        clips = _clips(config, plan, rank, decoded_by, shown=shown, on_rows=on_rows)
    if rank.world == 1:
        return Encoded(prompts, clips)
    return reconcile(config, plan, Encoded(prompts, clips, workers=rank.world))


def merged(made: Sequence[Encoded], *, workers: int) -> Encoded:
    """Put together what several workers report."""
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


def reconcile(config: CacheLatentsConfig, plan: Plan, made: Encoded) -> Encoded:
    """Correct the reports of workers by the store, which also has the rows of workers that died.

    Rows are those that the plan lacked and that are committed now; a committed row did not fail.
    """
    text = Committed(config.cache, "text", plan.fingerprint("text")).look()
    latents = Committed(config.cache, "latents", plan.fingerprint("latents"))
    wanted = {keyed.key for keyed in plan.missing_clips}
    rows = latents.look()
    there = rows.present(wanted)
    failures = {key: why for key, why in made.clips.failures.items() if key not in there}
    return replace(
        made,
        prompts=replace(made.prompts, rows=len(text.present(plan.missing_prompts))),
        clips=replace(made.clips, rows=len(there), failures=failures),
        clips_twice=rows.repeats(wanted),
    )


def same_encoders(config: CacheLatentsConfig, wanted: Encoders, *, local_rank: int = 0) -> Encoders:
    """Find this worker's model and device, and refuse what would make other rows.

    Raises:
        ModelError: Its weights, or what its device computes with, are not those of the plan.
    """
    here = planning.encoders_here(config, Hashes.read(config.cache), local_rank=local_rank)
    different = [
        *difference(wanted.latents_provenance, here.latents_provenance),
        *difference(wanted.text_provenance, here.text_provenance),
    ]
    if different:
        raise ModelError(
            f"the worker on {socket.gethostname()}, {here.device}, would not encode as the others: "
            f"{'; '.join(different)}. Give every machine the same model, and GPUs that agree on "
            "TF32 (or --set tf32=false)"
        )
    return here


def _prompts(
    config: CacheLatentsConfig, plan: Plan, rank: Rank, *, shown: bool, on_rows: OnRows
) -> EncodedPrompts:
    missing = plan.missing_prompts
    if not missing:
        return EncodedPrompts()
    with shown_progress(
        len(missing), "prompts", "prompt", shown=shown, on_rows=on_rows
    ) as progress:
        chunks, there = _rows(config, plan, "text", missing, rank, lambda _: 0, progress)
        return encode_prompts(config, plan.using, chunks, progress, committed=there)


def _clips(
    config: CacheLatentsConfig,
    plan: Plan,
    rank: Rank,
    decoded_by: Decode,
    *,
    shown: bool,
    on_rows: OnRows,
) -> EncodedClips:
    missing = {keyed.key: keyed.clip for keyed in plan.missing_clips}
    if not missing:
        return EncodedClips()
    with shown_progress(len(missing), "latents", "clip", shown=shown, on_rows=on_rows) as progress:
        chunks, there = _rows(
            config, plan, "latents", missing, rank, attrgetter("bucket"), progress
        )
        return encode_clips(
            config, plan.using, chunks, progress,
            largest=plan.largest,
            committed=there,
            decoded_by=decoded_by,
        )  # fmt: skip


def _rows(
    config: CacheLatentsConfig,
    plan: Plan,
    kind: Kind,
    missing: Mapping[str, T],
    rank: Rank,
    alike: Callable[[T], Any],
    progress: Progress,
) -> tuple[Iterator[dict[str, T]], Callable[[], Container[str]]]:
    """The chunks of a rank, and what others have committed; alone, there are no others."""
    if rank.world == 1:
        return whole(missing, alike=alike), frozenset
    there = Committed(config.cache, kind, plan.fingerprint(kind))
    most = config.store.clips_per_segment

    def elsewhere(rows: int) -> None:
        progress(rows, "")

    chunks = claim_chunks(
        missing, rank, there, most=most, alike=alike, elsewhere=elsewhere, look=there.look
    )
    return chunks, there


class CommittedOfPlan:
    """Rows of a plan that are committed by now, whichever worker made them.

    Args:
        config: The settings.
        plan: What was missing.

    Attributes:
        total: Number of rows that the plan lacked.
    """

    def __init__(self, config: CacheLatentsConfig, plan: Plan) -> None:
        wanted: dict[Kind, set[str]] = {
            "text": set(plan.missing_prompts),
            "latents": {keyed.key for keyed in plan.missing_clips},
        }
        self.total = sum(map(len, wanted.values()))
        self._plan = plan
        self._wanted = wanted
        self._committed = {
            kind: Committed(config.cache, kind, plan.fingerprint(kind)) for kind in wanted
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
    """Leave out of a plan what workers in other processes do not need."""
    return replace(plan, clips=(), failures=(), prompts={})


@contextmanager
def shown_progress(
    total: int, what: str, unit: str, *, shown: bool, on_rows: OnRows = None
) -> Iterator[Progress]:
    """Give a function that moves a bar, and says how it goes beside it."""
    with bar(total=total, description=what, unit=unit, shown=shown) as progress:

        def update(rows: int, note: str) -> None:
            if note:
                show_figures(progress, note)
            progress.update(rows)
            if on_rows:
                on_rows(rows)

        yield update
