"""Views: the clips, with their captions, that stage two trains on.

Owns: `CACHE/views/<name>.jsonl`, a header line, then one line per clip. A view is derived from the
manifest and the keys alone, so concurrent writers write the same bytes.
"""

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from wanlora.core.buckets import DEFAULT_FPS, Bucket
from wanlora.core.fingerprint import canonical_json, fingerprint
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.core.shares import weight_problem
from wanlora.errors import StoreError
from wanlora.store import schema, storage

FORMAT = "wanlora-view"


@dataclass(frozen=True, slots=True)
class ViewClip:
    """A clip: keys of its latents and captions, its activity and group, its weight and frame rate.

    Attributes:
        source_group: Clips of one group come from one source and are not independent.
        fps: Frames per second of the clip, > 0; 16 in every view of release 0.1.0.
        weight: Relative frequency of the clip in training, 0.001 to 1000; 1 is the default.
    """

    clip_id: str
    key: str
    bucket: Bucket
    prompts: tuple[str, ...]
    activity: str
    split: str
    source_group: str
    fps: float = DEFAULT_FPS
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ViewPrompt:
    """A prompt of previews, and the key of its embedding."""

    prompt: str
    key: str


@dataclass(frozen=True, slots=True)
class Encoding:
    """Encoder of the rows of one kind.

    Attributes:
        fingerprint: Whole fingerprint of the provenance.
        provenance: Everything that determines the value of a row.
    """

    fingerprint: str
    provenance: Mapping[str, Any]

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> "Encoding":
        """Return the encoding of a provenance."""
        return cls(fingerprint(provenance), provenance)


@dataclass(frozen=True, slots=True)
class View:
    """Header and clips. `encodings` names the encoder of each kind of row that the view has.

    `name` and `sha256` come from the file and are not written into it. `sha256` is the identity of
    what is trained on: of the file without the clips' frame rates, which change no trained value.
    A view that only gained frame rates therefore continues the runs of the earlier one.
    """

    encodings: Mapping[Kind, Encoding]
    model: str
    variant: str
    shift: float
    empty_prompt: str
    negative_prompt: str
    validation_prompts: tuple[ViewPrompt, ...]
    clips: tuple[ViewClip, ...]
    name: str = field(default="", compare=False)
    sha256: str = field(default="", compare=False)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of rows of the view, in the order of `schema.KINDS`."""
        return tuple(kind for kind in schema.KINDS if kind in self.encodings)

    def fingerprint(self, kind: Kind) -> str:
        """Whole fingerprint of the encoder of a kind."""
        return self.encodings[kind].fingerprint

    def provenance(self, kind: Kind) -> Mapping[str, Any]:
        """Everything that determines the value of a row of a kind."""
        return self.encodings[kind].provenance

    def keys(self, kind: Kind) -> list[str]:
        """Keys of the view's rows of a kind: of its clips in order, or sorted ones of prompts."""
        return (
            [clip.key for clip in self.clips] if schema.KINDS[kind].per_clip else self.prompt_keys()
        )

    def prompt_keys(self) -> list[str]:
        """Sorted keys of all prompts of the view, without repeats."""
        keys = {key for clip in self.clips for key in clip.prompts}
        keys |= {self.empty_prompt, self.negative_prompt}
        return sorted(keys | {prompt.key for prompt in self.validation_prompts})


def write_view(cache: Location, name: str, view: View) -> View:
    """Publish a view atomically; replaces the view of that name.

    Returns:
        The view with its name and sha256.
    """
    data = document(view)
    storage.at(cache).put(_key(name), data)
    return replace(view, name=name, sha256=_identity(data))


def document(view: View) -> bytes:
    """Serialize a view: a header line, then one line per clip, sorted by clip id."""
    header = {
        "format": FORMAT,
        "version": schema.VERSION,
        **{str(kind): view.fingerprint(kind) for kind in view.kinds},
        **{f"{kind}_provenance": dict(view.provenance(kind)) for kind in view.kinds},
        "model": view.model,
        "variant": view.variant,
        "shift": view.shift,
        "empty_prompt": view.empty_prompt,
        "negative_prompt": view.negative_prompt,
        "validation_prompts": [
            {"prompt": prompt.prompt, "key": prompt.key} for prompt in view.validation_prompts
        ],
    }
    lines = [header] + [
        {
            "clip_id": clip.clip_id,
            "key": clip.key,
            "bucket": list(clip.bucket),
            "prompts": list(clip.prompts),
            "activity": clip.activity,
            "split": clip.split,
            "source_group": clip.source_group,
            **({"fps": clip.fps} if clip.fps != DEFAULT_FPS else {}),
            **({"weight": clip.weight} if clip.weight != 1 else {}),
        }
        for clip in sorted(view.clips, key=lambda clip: clip.clip_id)
    ]
    return "".join(f"{canonical_json(line)}\n" for line in lines).encode()


def read_view(cache: Location, name: str) -> View:
    """Read a view; unknown attributes are ignored.

    Raises:
        StoreError: There is no such view, or it is damaged; lists the existing views.
        StoreVersionError: It has another version.
    """
    path = str(cache / _key(name))
    data = storage.at(cache).get(_key(name))
    if data is None:
        others = ", ".join(view_names(cache)) or "none"
        raise StoreError(
            f"no view {name!r} in {cache} (there are: {others}); make it with: "
            f"wanlora cache-latents --cache {cache} --view {name}"
        )
    try:
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="\n")
        header = json.loads(text.readline())
        schema.check_version(header, path, name=FORMAT)
        view = _parse(header, (json.loads(line) for line in text))
        _check(view)
    except schema.DAMAGE as error:
        raise StoreError(
            f"{path} is damaged ({type(error).__name__}: {error}); make it again with: "
            f"wanlora cache-latents --cache {cache} --view {name}"
        ) from error
    return replace(view, name=name, sha256=_identity(data))


def read_header(cache: Location, name: str) -> View | None:
    """Read only the header of a view, as a view without clips; None if it cannot be read."""
    data = storage.at(cache).get(_key(name))
    try:
        return replace(_parse(json.loads((data or b"").partition(b"\n")[0]), ()), name=name)
    except schema.DAMAGE:
        return None


def kinds_in(header: Mapping[str, Any]) -> Sequence[Kind]:
    """Kinds of rows that the header of a view names.

    Raises:
        KeyError: It names no latents or no prompts, without which a view is damaged.
    """
    kinds: list[Kind] = [kind for kind in schema.KINDS if kind in header]
    for kind in ("latents", "text"):
        if kind not in kinds:
            raise KeyError(kind)
    return kinds


def _check(view: View) -> None:
    for kind, encoding in view.encodings.items():
        if fingerprint(encoding.provenance) != encoding.fingerprint:
            wanted = f"the fingerprint {encoding.fingerprint}"
            raise ValueError(f"its provenance of {kind} does not have {wanted}")
    for bucket in {clip.bucket for clip in view.clips}:
        if not all(type(size) is int and size > 0 for size in bucket):
            raise ValueError(f"a clip has the size {bucket}")


def view_names(cache: Location) -> list[str]:
    """Names of the views of a cache, sorted."""
    names = storage.at(cache).files(schema.VIEWS)
    return [name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")]


def frame_rate(clips: Iterable[ViewClip]) -> float:
    """Frame rate, in frames per second, of most clips; still images count only without videos."""
    number = Counter((clip.bucket.num_frames > 1, clip.fps) for clip in clips)
    (_, fps) = max(number, key=lambda item: (item[0], number[item], item[1]))
    return fps


def _identity(data: bytes) -> str:
    """Hex sha256 of a view's bytes, clips without their `fps`."""
    digest = hashlib.sha256()
    for line in io.BytesIO(data):  # one line at a time: a million clips are 280 MB
        if b'"fps":' in line:  # in a text the quotes would be escaped
            clip = json.loads(line)
            clip.pop("fps", None)
            line = f"{canonical_json(clip)}\n".encode()  # noqa: PLW2901
        digest.update(line)
    return digest.hexdigest()


def _key(name: str) -> str:
    return f"{schema.VIEWS}/{name}.jsonl"


def _parse(header: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> View:
    seen: dict[Any, Any] = {}

    def shared(value: Any) -> Any:
        """Return the first equal value, so that equal values are in memory once."""
        return seen.setdefault(value, value)

    return View(
        encodings={
            kind: Encoding(header[kind], header[f"{kind}_provenance"]) for kind in kinds_in(header)
        },
        model=header["model"],
        variant=header["variant"],
        shift=float(header["shift"]),
        empty_prompt=header["empty_prompt"],
        negative_prompt=header["negative_prompt"],
        validation_prompts=tuple(
            ViewPrompt(item["prompt"], item["key"]) for item in header["validation_prompts"]
        ),
        clips=tuple(
            ViewClip(
                clip_id=line["clip_id"],
                key=line["key"],
                bucket=shared(Bucket(*line["bucket"])),
                prompts=tuple(line["prompts"]),
                activity=shared(line["activity"]),
                split=shared(line["split"]),
                source_group=shared(line["source_group"]),
                fps=shared(_fps(line)),
                weight=shared(_weight(line)),
            )
            for line in lines
        ),
    )


def _fps(line: Mapping[str, Any]) -> float:
    fps = float(line.get("fps", DEFAULT_FPS))
    if not 0 < fps < math.inf:
        raise ValueError(f"clip {line['clip_id']}: fps {fps}; expected a number > 0")
    return fps


def _weight(line: Mapping[str, Any]) -> float:
    weight = float(line.get("weight", 1.0))
    if problem := weight_problem(weight):
        raise ValueError(f"clip {line['clip_id']}: weight {weight}; {problem}")
    return weight


def no_such_split(view: View, split: str) -> StoreError:
    """Build the error for a view without clips of a split; it names the fix."""
    splits = ", ".join(sorted({clip.split for clip in view.clips})) or "none"
    return StoreError(
        f"view {view.name!r} has no clips of split {split!r}; it has {len(view.clips)} clips, of "
        f"splits: {splits}. Hold some out with wanlora prepare --val-fraction 0.05 and run wanlora "
        "cache-latents again (which encodes nothing twice), or choose another with --set split=..."
    )
