"""What an estimate says: figures for a program, a table for a person."""

from dataclasses import dataclass
from typing import Any

from wanlora.core import units
from wanlora.report.text_table import text_table

LINK = 50e9
"""Bytes a second of a network card of 400 Gbit/s, one for each GPU of a node."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of keeping activations, the same for all blocks.

    Attributes:
        peak_gb: Of the largest micro-batch, weights included.
        fits: Whether the card has that much.
        seconds_per_step: Of an optimizer step; None where nothing is known of the card.
        longest: Frames of the longest clip of the largest bucket's size that would fit, at most
            that bucket's; None when none does.
    """

    peak_gb: float
    fits: bool
    seconds_per_step: float | None
    longest: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """A step of one bucket, in the way of keeping activations that was chosen.

    Attributes:
        clips: Of a step.
        micro_batch: Clips that go through the transformer at once.
        tflop: What the mathematics of the step needs.
        seconds: Seconds of the step; None if they are not known.
        peak_gb: Of a micro-batch, weights included.
    """

    clips: int
    micro_batch: int
    tflop: float
    seconds: float | None
    peak_gb: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Forward passes between steps, for validation or previews.

    Attributes:
        times: Number of pauses in the run.
        forward_passes: Forward passes of one clip in the run, over all processes; of validation,
            the base's losses included.
        hours: Hours of the run that they take; None if they are not known.
    """

    times: int
    forward_passes: int
    hours: float | None


@dataclass(frozen=True, slots=True)
class EstimateResult:
    """What a run takes, on one GPU or on a GPU for each of several processes.

    Attributes:
        variant: The model.
        gpu: The card's name, or the device that was probed.
        measured: Whether seconds were scaled by a probe; else they are predictions.
        buckets: Clips to train on by size.
        lora: The adapter, in words.
        trained_parameters: Of the adapter.
        batches: What a step of each size has and takes. What follows is the mean over steps.
        clips_per_step: The global batch.
        num_processes: That share it.
        sent_bytes_per_step: By each process, to sum the adapter's gradient over all of them.
        tflop_per_step: What the mathematics of an optimizer step needs.
        floor_s: Least seconds of a step with these kernels: attention and matrix products alone.
        seconds_per_step: In the way that `activations` names; None, like all hours, for a GPU
            whose rates are not known.
        parts: Of that, by attention, matmul and elementwise.
        mfu: Of the card's bf16 peak, at that speed.
        activations: The way chosen: of `modes`, or a mixture.
        peak_gb: Its peak.
        fits: Whether the card has that much.
        memory_gb: What a step may take on the card.
        modes: Every way.
        steps: Of the run.
        hours_per_epoch: Of the steps of an epoch.
        hours: Of the whole run: steps, validation and previews.
        validation: The part of validation.
        previews: The part of previews.
        stage_one_hours: To encode every clip.
        cache_gb: Of the store; measured where there is one.
        checkpoints_gb: Those that are kept.
        untrained: Buckets without a step in the run, and the ways to train them.
        too_short: Warning about a run too short to learn from; None for others.
        assumed: What the seconds stand on.
        probe: What the probe saw.
    """

    variant: str
    gpu: str
    measured: bool
    buckets: dict[str, int]
    lora: str
    trained_parameters: int
    batches: dict[str, Batch]
    clips_per_step: float
    num_processes: int
    sent_bytes_per_step: int
    tflop_per_step: float
    floor_s: float | None
    seconds_per_step: float | None
    parts: dict[str, float]
    mfu: float | None
    activations: str
    peak_gb: float
    fits: bool
    memory_gb: float
    modes: dict[str, Mode]
    steps: int
    hours_per_epoch: float | None
    hours: float | None
    validation: Pause
    previews: Pause
    stage_one_hours: float | None
    cache_gb: float
    checkpoints_gb: float
    untrained: list[str]
    too_short: str | None
    assumed: dict[str, str]
    probe: dict[str, Any] | None

    @property
    def exit_code(self) -> int:
        """0: a run that does not fit was still estimated."""
        return 0

    def lines(self) -> list[str]:
        """Say it as a table, and what was assumed."""
        unknown = "memory counted, time not known"
        predicted = "predicted, not measured" if self.seconds_per_step else unknown
        how = "measured by a probe" if self.measured else predicted
        sizes = ", ".join(f"{number:,} of {bucket}" for bucket, number in self.buckets.items())
        return [
            f"{self.variant} on {self.gpu} ({_size(self.memory_gb)} for a step), {how}",
            f"clips to train on: {sizes}",
            f"adapter: {self.lora}, {units.number(self.trained_parameters)} parameters",
            *self._modes_table(),
            *self._batches_table(),
            "",
            *self._totals(),
            *(f"warning: {text}" for text in (*self.untrained, self.too_short) if text),
            "",
            *(f"assumed: {name}: {what}" for name, what in self.assumed.items()),
        ]

    def _modes_table(self) -> list[str]:
        rows = [
            (
                name,
                _size(mode.peak_gb),
                "yes" if mode.fits else "no",
                _time(mode.seconds_per_step),
                f"{mode.longest} frames" if mode.longest else "none",
            )
            for name, mode in self.modes.items()
        ]
        if self.activations not in self.modes:
            fits = "yes" if self.fits else "no"
            pace = _time(self.seconds_per_step)
            rows.append((self.activations, _size(self.peak_gb), fits, pace, ""))
        head = ("activations", "peak memory", "fits", "time per step", "longest clip that fits")
        return text_table(head, rows)

    def _batches_table(self) -> list[str]:
        """What a step has, by bucket; nothing where there is one."""
        rows = [
            (
                name,
                batch.clips,
                batch.micro_batch,
                units.flops(1e12 * batch.tflop),
                _time(batch.seconds),
                _size(batch.peak_gb),
            )
            for name, batch in self.batches.items()
        ]
        head = ("bucket", "clips per step", "at once", "work", "time per step", "peak memory")
        return text_table(head, rows) if len(rows) > 1 else []

    def _totals(self) -> list[str]:
        clips = f"{self.clips_per_step:.3g} clip{'s' if self.clips_per_step > 1 else ''}"
        clips += f" by {self.num_processes} processes" if self.num_processes > 1 else ""
        encode = f"{_hours(self.stage_one_hours)}, once" if self.stage_one_hours else "unknown"
        lines = [
            f"{'a step' if len(self.batches) == 1 else 'a mean step':<12} {clips}, "
            f"{units.flops(1e12 * self.tflop_per_step)}: {self._pace()}",
            *self._parts(),
            *self._between_gpus(),
            f"an epoch     {_hours(self.hours_per_epoch)}",
            *self._pauses(),
            f"the run      {units.count(self.steps, 'step')}, {_hours(self.hours)} in all",
            f"stage one    {encode}",
            f"disk         {_size(self.cache_gb)} of cache, {_size(self.checkpoints_gb)} of "
            "checkpoints",
        ]
        return lines if self.fits else [*lines, self._does_not_fit()]

    def _pace(self) -> str:
        floor = f", floor {_time(self.floor_s)}" if self.floor_s is not None else ""
        share = f", MFU {units.percent(self.mfu)}" if self.mfu is not None else ""
        pace = _time(self.seconds_per_step) if self.seconds_per_step else "unknown time"
        return f"{pace} with activations {self.activations}{share}{floor}"

    def _parts(self) -> list[str]:
        parts = ", ".join(f"{name} {_time(seconds)}" for name, seconds in self.parts.items())
        return [f"             ({parts})"] if parts else []

    def _does_not_fit(self) -> str:
        advice = (
            "shorter clips (--set train_frames=N when training), a smaller adapter or batch, or a "
            "larger GPU"
            if any(mode.longest for mode in self.modes.values())
            else "not even a single frame would fit; use a larger GPU"
        )
        return f"does not fit: {_size(self.peak_gb)} of {_size(self.memory_gb)}; {advice}"

    def _pauses(self) -> list[str]:
        parts = {"validation": self.validation, "previews": self.previews}
        return [
            f"{name:<12} {_hours(pause.hours)}{self._share(pause)}: "
            f"{units.count(pause.times, 'time')}, "
            f"{units.count(pause.forward_passes, 'forward pass', 'forward passes')}"
            for name, pause in parts.items()
            if pause.times
        ]

    def _share(self, pause: Pause) -> str:
        if pause.hours is None or not self.hours:
            return ""
        return f" ({units.percent(pause.hours / self.hours)} of the run)"

    def _between_gpus(self) -> list[str]:
        """Bytes that a step sends; not added to its seconds, of which it is a small part."""
        if self.num_processes == 1:
            return []
        sent = self.sent_bytes_per_step
        return [
            f"between GPUs {units.size(sent)} per step sent by each process, "
            f"{units.duration(sent / LINK)} at {units.size(LINK)}/s"
        ]


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else units.duration(seconds)


def _hours(hours: float | None) -> str:
    return "unknown time" if hours is None else units.duration(3600 * hours)


def _size(gigabytes: float) -> str:
    return units.size(1e9 * gigabytes)
