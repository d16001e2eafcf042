"""Result of `wanlora inspect` of a cache.

Owns: the tables. Must not know: how a cache is read.
"""

from dataclasses import dataclass, field
from typing import Any

from wanlora.core.units import JSON, count, first, size
from wanlora.report.text_table import text_table
from wanlora.store import schema


@dataclass(frozen=True, slots=True)
class InspectResult:
    """Content of a cache.

    Attributes:
        cache: The folder or URL.
        clips: Different clips with latents, over all fingerprints.
        prompts: Different prompts with an embedding.
        buckets: One dict per size: bucket, latent_shape, clips, bytes, bytes_per_clip, statistics.
        bytes: Size of the whole store on disk.
        bytes_per_clip: Size of the whole store per clip; 0 without clips.
        fingerprints: One dict per encoder: kind, fingerprint, rows, segments, bytes, provenance.
        views: One dict per view: name, clips, splits, prompts, model, missing (number of rows by
            kind), missing_clips (those that lack a row of any kind), missing_prompts.
        wants: One dict per run of cache-latents that has not published its view: name, view,
            rows, missing.
        invalid: A line for each row, record or view that cannot be used.
        unread: A line for each row that the disk or network did not return; it may be intact.
        verified: Rows that were checked.
        level: Level of the check: fast or full; empty without a check.
        repaired: Result of --repair: dropped, encoded, failures.
        freed: Result of --gc: rows, repeats, young, dropped, rewritten, leftovers, bytes, wants,
            dry_run.
        page: The page that --html wrote.
        decoded: One dict per clip: clip_id, key, video, psnr_db.
    """

    cache: str
    clips: int
    prompts: int
    buckets: list[dict[str, Any]]
    bytes: int
    bytes_per_clip: float
    fingerprints: list[dict[str, Any]]
    views: list[dict[str, Any]]
    wants: list[dict[str, Any]] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    verified: int = 0
    level: str = ""
    repaired: dict[str, Any] = field(default_factory=dict)
    freed: dict[str, Any] = field(default_factory=dict)
    page: str = ""
    decoded: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """3 if something is invalid or could not be read, or a view lacks rows."""
        return 3 if self.invalid or self.unread or self._lacking else 0

    @property
    def _lacking(self) -> bool:
        return any(number for view in self.views for number in view["missing"].values())

    def lines(self) -> list[str]:
        """Format the result as tables."""
        return [
            f"{self.cache}: {count(self.clips, 'clip')}, {count(self.prompts, 'prompt')}, "
            f"{size(self.bytes)} "
            f"({size(self.bytes_per_clip)} a clip)",
            *text_table(
                ["bucket", "latents", "clips", "size", "a clip"],
                [
                    [
                        row["bucket"], "x".join(map(str, row["latent_shape"])), row["clips"],
                        size(row["bytes"]), size(row["bytes_per_clip"]),
                    ]
                    for row in self.buckets
                ],
            ),
            *self._statistics(),
            *text_table(
                ["kind", "fingerprint", "rows", "segments", "size", "made with"],
                [
                    [
                        row["kind"], schema.short(row["fingerprint"]), row["rows"], row["segments"],
                        size(row["bytes"]), _made_with(row["provenance"]),
                    ]
                    for row in self.fingerprints
                ],
            ),
            *text_table(
                ["view", "clips", "splits", "prompts", "kinds of rows", "rows"],
                [
                    [
                        row["name"], row["clips"],
                        ", ".join(f"{n} {split}" for split, n in row["splits"].items()),
                        row["prompts"], ", ".join(row["missing"]), _completeness(row),
                    ]
                    for row in self.views
                ],
            ),
            *text_table(
                ["unfinished run of cache-latents", "view", "rows", "not encoded yet"],
                [[row["name"], row["view"], row["rows"], row["missing"]] for row in self.wants],
            ),
            *self._jobs(),
            *self._verdict(),
        ]  # fmt: skip

    def _statistics(self) -> list[str]:
        rows, outliers = [], []
        for bucket in self.buckets:
            found = bucket["statistics"]
            if not found["clips"]:
                continue
            mean, std = found["channel_mean"], found["channel_std"]
            rows.append([
                bucket["bucket"], f"{found['clips']} of {bucket['clips']}",
                f"{sum(mean) / len(mean):+.2f} ({min(mean):+.2f} .. {max(mean):+.2f})",
                f"{sum(std) / len(std):.2f} ({min(std):.2f} .. {max(std):.2f})",
                len(found["outliers"]),
            ])  # fmt: skip
            outliers += found["outliers"]
        head = ["statistics", "clips read", "channel mean (of 0)", "channel std (of 1)", "outliers"]
        return [*text_table(head, rows), *first(outliers, JSON)]

    def _jobs(self) -> list[str]:
        lines = [""]
        if self.repaired:
            lines.append(
                f"repair: {self.repaired['dropped']} rows dropped, {self.repaired['encoded']} "
                "encoded again"
            )
            lines += first(self.repaired["failures"], JSON)
        if self.freed:
            lines += _freed(self.freed)
        if self.page:
            lines.append(f"page: {self.page}")
        lines += [
            f"{row['video']}: "
            + ("its source is gone" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB PSNR")
            for row in self.decoded
        ]
        return lines if len(lines) > 1 else []

    def _verdict(self) -> list[str]:
        lines = []
        if self.verified:
            how = "read and checked" if self.level == "full" else "checked by records and sizes"
            lines.append(f"{count(self.verified, 'row')} {how}")
        if self.invalid:
            lines.append(f"{len(self.invalid)} invalid:")
            lines += first(self.invalid, JSON)
            lines.append(f"to repair it: wanlora inspect {self.cache} --repair --manifest MANIFEST")
        if self.unread:
            lines.append(
                f"{len(self.unread)} could not be read, and may be intact; run inspect again when "
                "the disk or the network responds:"
            )
            lines += first(self.unread, JSON)
        if self.invalid or self._lacking:
            lines.append(f"to encode missing rows: wanlora cache-latents --cache {self.cache}")
        return lines


def _freed(freed: dict[str, Any]) -> list[str]:
    verb = "would free" if freed["dry_run"] else "freed"
    lines = [
        f"gc {verb} about {size(freed['bytes'])}: {freed['rows']} unreferenced rows, "
        f"{freed['repeats']} repeated rows, {freed['leftovers']} leftovers of killed processes; "
        f"{freed['dropped']} segments removed, {freed['rewritten']} rewritten"
    ]
    if freed["young"]:
        lines.append(
            f"  {freed['young']} unreferenced rows were kept because they are new; to free them: "
            "--set gc_min_age_h=0"
        )
    lines += [
        f"  the rows of {name}, an unfinished run of cache-latents, were kept; finish it with "
        f"cache-latents, or free them with --set 'gc_drop_wants=[\"{name}\"]'"
        for name in freed["wants"]
    ]
    return lines


def _made_with(provenance: dict[str, Any]) -> str:
    """Main fields of a provenance on one line: hashes shortened, lists left out."""
    parts = []
    for name, value in provenance.items():
        if name == "kind" or value is None or isinstance(value, list | dict):
            continue
        parts.append(f"{name}={schema.short(value) if len(str(value)) == 64 else value}")
    return " ".join(parts)


def _completeness(view: dict[str, Any]) -> str:
    lacking = [f"{number} {kind}" for kind, number in view["missing"].items() if number]
    return f"MISSING {', '.join(lacking)}" if lacking else "all there"
