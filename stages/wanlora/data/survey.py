"""Contents of a set of clips, and the cost of encoding it.

Owns: the counts that `prepare --dry-run` and `verify` print. Values are counted from the clips
unless their text contains "predicted" or "estimated".
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wanlora.core.buckets import MAX_TOKENS, num_tokens, problem_with
from wanlora.core.shares import shares
from wanlora.core.units import JSON, count, duration, first, percent, size
from wanlora.cost.seconds import h100_encode_seconds
from wanlora.cost.sizes import cache_bytes
from wanlora.data.clip import TRAIN, VAL, Clip
from wanlora.data.near_duplicates import THRESHOLD, difference, similar_pairs

COMPARED = 100
"""Maximum number of pairs of similar captions whose difference is printed or counted."""


class SimilarPair(NamedTuple):
    """Two captions with mostly the same words, and one clip of each."""

    one: str
    other: str
    similarity: float
    clips: tuple[str, str]


@dataclass(frozen=True)
class Captions:
    """Statistics of the captions.

    Attributes:
        unique: Number of different captions.
        tokenizer: Folder of the tokenizer that counted; None if the counts are estimates.
        longest: Tokens of the longest caption.
        over_limit: Clips with a caption of more than 512 tokens, and its number of tokens.
        near_duplicates: Pairs of different captions that share 80 % of their words or more.
        near_duplicates_complete: False if the search stopped at 1,000 pairs.
        shared: Captions of clips from more than one source.
    """

    unique: int
    tokenizer: str | None
    longest: int
    over_limit: tuple[tuple[str, int], ...]
    near_duplicates: tuple[SimilarPair, ...]
    near_duplicates_complete: bool
    shared: int

    def near_duplicate_rows(self) -> list[tuple[str, str]]:
        """Number of similar pairs, then each difference once, with clips that have it."""
        pairs = self.near_duplicates
        if not pairs:
            return []
        number = count(len(pairs), "pair") + ("" if self.near_duplicates_complete else " or more")
        groups: dict[str, list[SimilarPair]] = defaultdict(list)
        for pair in pairs[:COMPARED]:
            groups[difference(pair.one, pair.other)].append(pair)
        lines = [
            f"{text}: {' and '.join(group[0].clips)}"
            + (f", and {count(len(group) - 1, 'other pair')}" if len(group) > 1 else "")
            for text, group in groups.items()
        ]
        head = f"{number} of captions with {percent(THRESHOLD)} of their words in common or more"
        return [("nearly same", head), *(("", line) for line in first(lines, JSON, indent=""))]


@dataclass(frozen=True)
class Activity:
    """Share of one activity.

    Attributes:
        draws: Expected share of the clips drawn in training, by their weights; 0 to 1.
    """

    clips: int
    sources: int
    train: int
    val: int
    length_s: float
    draws: float


@dataclass(frozen=True)
class Plan:
    """Contents of the training data, and the cost of encoding it.

    Attributes:
        frames: Number of frames of all clips.
        tokens: Length of the transformer's sequence, by bucket.
        duplicate_sources: Groups of files with equal content.
        repeated_frames: Number of frames equal to the one before, from the same video frame.
        repeating_clips: Clips with a warning about such frames.
        cache_bytes: Estimated size of the store: latents and text in float16.
        encode_s: Predicted seconds of stage one on an H100, lower and upper bound.
    """

    clips: int
    frames: int
    length_s: float
    buckets: dict[str, int]
    tokens: dict[str, int]
    activities: dict[str, Activity]
    captions: Captions
    duplicate_sources: tuple[tuple[str, ...], ...]
    repeated_frames: int
    repeating_clips: int
    cache_bytes: int
    encode_s: tuple[float, float]

    def rows(self) -> list[tuple[str, str]]:
        """Name and text of every line of the plan."""
        table = [
            (
                "frames",
                f"{self.frames:,} in {count(self.clips, 'clip')}, {duration(self.length_s)}",
            ),
            *(
                ("bucket", f"{name}  {count(number, 'clip')}, {self.tokens[name]:,} tokens each")
                for name, number in self.buckets.items()
            ),
            *(("activity", _activity_line(name, row)) for name, row in self.activities.items()),
            ("balance", self._balance()),
            *self._caption_rows(),
        ]
        groups = [" = ".join(group) for group in self.duplicate_sources]
        table += [("same bytes", line) for line in first(groups, JSON, indent="")]
        if self.repeated_frames:
            repeats = (
                f"{self.repeated_frames:,} of {self.frames:,} frames show the one before again"
            )
            clips = count(self.repeating_clips, "clip")
            table.append(("repeats", f"{repeats}; often in {clips}"))
        low, high = self.encode_s
        table += [
            ("cache", f"about {size(self.cache_bytes)} (estimated: float16 latents, text)"),
            ("stage one", f"{duration(low)} to {duration(high)} on an H100 (predicted)"),
        ]
        return table

    def _balance(self) -> str:
        sizes = sorted(row.clips for row in self.activities.values())
        if len(sizes) < 2:
            return "one activity"
        return f"largest activity {sizes[-1] / sizes[0]:.1f} times the smallest"

    def _caption_rows(self) -> list[tuple[str, str]]:
        found = self.captions
        about, how = ("", "") if found.tokenizer else ("about ", ", estimated: no tokenizer here")
        rows = [
            (
                "captions",
                f"{found.unique:,} different, {found.shared:,} of them at several sources; the "
                f"longest has {about}{found.longest} of {MAX_TOKENS} tokens{how}",
            )
        ]
        cut = [
            f"{clip_id}: {about}{tokens} tokens, cut at {MAX_TOKENS}"
            for clip_id, tokens in found.over_limit
        ]
        rows += [("too long", line) for line in first(cut, JSON, indent="")]
        return [*rows, *found.near_duplicate_rows()]


def survey(
    clips: Sequence[Clip], token_counts: Mapping[str, int], *, tokenizer: str | None
) -> Plan:
    """Count the clips and estimate the cost of encoding them.

    Args:
        clips: Clips of one or several manifests.
        token_counts: Number of tokens of every caption.
        tokenizer: Folder of the tokenizer that counted; None if the counts are estimates.
    """
    usable = [clip for clip in clips if problem_with(clip.bucket) is None]
    texts = {text for clip in clips for text in clip.prompts}
    buckets = Counter(clip.bucket for clip in usable)
    low, high = h100_encode_seconds(buckets)
    return Plan(
        clips=len(clips),
        frames=sum(clip.num_frames for clip in clips),
        length_s=round(sum(clip.num_frames / clip.fps for clip in clips), 3),
        buckets={str(bucket): number for bucket, number in buckets.most_common()},
        tokens={str(bucket): num_tokens(bucket) for bucket, _ in buckets.most_common()},
        activities=_activities(clips),
        captions=_captions(clips, token_counts, tokenizer),
        duplicate_sources=_duplicates(clips),
        repeated_frames=sum(_repeated_frames(clip) for clip in clips),
        repeating_clips=sum(any(w.startswith("repeated:") for w in c.warnings) for c in clips),
        cache_bytes=cache_bytes(buckets, sum(min(token_counts[t], MAX_TOKENS) for t in texts)),
        encode_s=(round(low, 1), round(high, 1)),
    )


def _repeated_frames(clip: Clip) -> int:
    """Number that `prepare` wrote; 0 in older lines, of images and of .npz clips."""
    count = clip.orig.get("repeated_frames")
    return count if isinstance(count, int) else 0


def _activities(clips: Sequence[Clip]) -> dict[str, Activity]:
    members: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        members[clip.activity].append(clip)
    draws = shares((c.activity, c.weight) for c in clips if c.split == TRAIN)
    return {
        name: Activity(
            clips=len(own),
            sources=len({clip.source for clip in own}),
            train=sum(clip.split == TRAIN for clip in own),
            val=sum(clip.split == VAL for clip in own),
            length_s=round(sum(clip.num_frames / clip.fps for clip in own), 3),
            draws=round(draws.get(name, 0.0), 4),
        )
        for name, own in sorted(members.items())
    }


def _captions(
    clips: Sequence[Clip], token_counts: Mapping[str, int], tokenizer: str | None
) -> Captions:
    sources: dict[str, set[str]] = defaultdict(set)
    first_clip: dict[str, str] = {}
    for clip in clips:
        for text in clip.prompts:
            sources[text].add(clip.source_sha256 or clip.source)
            first_clip.setdefault(text, clip.clip_id)
    texts = sorted(sources)
    similar = similar_pairs(texts)
    over = [(clip.clip_id, max(token_counts[text] for text in clip.prompts)) for clip in clips]
    return Captions(
        unique=len(texts),
        tokenizer=tokenizer,
        longest=max((token_counts[text] for text in texts), default=0),
        over_limit=tuple((clip_id, tokens) for clip_id, tokens in over if tokens > MAX_TOKENS),
        near_duplicates=tuple(
            SimilarPair(
                texts[i], texts[j], round(s, 3), (first_clip[texts[i]], first_clip[texts[j]])
            )
            for i, j, s in similar.pairs
        ),
        near_duplicates_complete=similar.complete,
        shared=sum(len(found) > 1 for found in sources.values()),
    )


def _duplicates(clips: Sequence[Clip]) -> tuple[tuple[str, ...], ...]:
    sources: dict[str, dict[str, None]] = defaultdict(dict)
    for clip in clips:
        if clip.source_sha256 is not None:
            sources[clip.source_sha256][clip.source] = None
    return tuple(tuple(found) for found in sources.values() if len(found) > 1)


def _activity_line(name: str, row: Activity) -> str:
    return (
        f"{name}  {count(row.clips, 'clip')} of {count(row.sources, 'source')}, "
        f"{duration(row.length_s)}, "
        f"train {row.train:,}, val {row.val:,}, {percent(row.draws)} of draws"
    )
