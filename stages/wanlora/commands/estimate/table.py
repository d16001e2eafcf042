"""Result of an estimate: figures for a program, and a table for a person.

Owns: the fields of `--json` and the lines of the table. Must not know how figures are calculated.
"""

from dataclasses import dataclass
from typing import Any

from wanlora.commands.estimate.cards import CardFit, table
from wanlora.core import units
from wanlora.report.text_table import text_table

LINK_BYTES_PER_S = 50e9
"""Rate of a network card of 400 Gbit/s, one for each GPU of a node."""


@dataclass(frozen=True, slots=True)
class Mode:
    """Peak memory and seconds if all blocks keep their activations in the same mode.

    Attributes:
        peak_gb: Memory of the largest micro-batch, weights included.
        fits: True if the card has this much memory.
        seconds_per_step: Seconds of an optimizer step; None if the card's rates are not known.
        longest: Frames of the longest clip of the largest bucket's size that would fit, at most
            that bucket's; None if no clip fits.
    """

    peak_gb: float
    fits: bool
    seconds_per_step: float | None
    longest: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """A step of one bucket, with the selected modes of keeping activations.

    Attributes:
        clips: Clips of the step.
        micro_batch: Clips that go through the transformer at once.
        tflop: TFLOP of the step, recomputation not counted.
        seconds: Seconds of the step; None if they are not known.
        peak_gb: Memory of a micro-batch, weights included.
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
        hours: Hours of all pauses; None if they are not known.
    """

    times: int
    forward_passes: int
    hours: float | None


@dataclass(frozen=True, slots=True)
class EstimateResult:
    """Time, memory and disk of a run, on one GPU or on one GPU for each of several processes.

    Figures of a step are means over the steps of all buckets.

    Attributes:
        variant: Variant of the model.
        expert: Transformer that the run trains, of a model with two; None = either.
        num_experts: Transformers of the model; each is trained in a run of its own.
        gpu: Name of the card, or of the device that was probed.
        measured: True if a probe scales the seconds; otherwise they are predictions.
        buckets: Number of clips to train on, by bucket.
        lora: The adapter, in words.
        trained_parameters: Parameters of the adapter.
        batches: Steps of each bucket.
        clips_per_step: Clips of the global batch.
        num_processes: Processes that share the global batch.
        sent_bytes_per_step: Bytes that each process sends to sum the adapter's gradient.
        tflop_per_step: TFLOP of an optimizer step over all processes, recomputation not counted.
        floor_s: Minimum seconds of a step with these kernels: attention and matrix products alone.
        seconds_per_step: Seconds of a step with `activations`; None, like all hours, for a GPU
            whose rates are not known.
        parts: Seconds of a step in attention, matmul and elementwise kernels.
        mfu: Share of the card's bf16 peak at that speed.
        activations: The selected mode, one of `modes` or a mixture.
        quantize: Format of the frozen weights in the blocks.
        num_streamed: Blocks whose weights wait in host memory, also in `modes` and `batches`.
        host_gb: Host memory of these blocks, in each process.
        peak_gb: Peak memory in this mode.
        fits: True if the card has this much memory.
        memory_gb: Memory of the card that a step may take.
        modes: Every mode, for all blocks.
        steps: Steps of the run.
        hours_per_epoch: Hours of the steps of an epoch.
        hours: Hours of the whole run: steps, validation and previews.
        hours_of_experts: Hours of a run for each transformer of the model, one after the other.
        validation: Pauses for validation.
        previews: Pauses for previews.
        stage_one_hours: Hours to encode every clip.
        cache_gb: Size of the store; measured if it exists.
        checkpoints_gb: Size of the checkpoints that the run keeps.
        untrained: Buckets without a step in the run, and how to train them.
        too_short: Warning about a run too short to learn from; None for others.
        assumed: Assumptions behind the seconds.
        probe: Result of the probe.
        cards: Plans for cards of 16 to 80 GB, with `--cards`.
    """

    variant: str
    expert: str | None
    num_experts: int
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
    quantize: str
    num_streamed: int
    host_gb: float
    peak_gb: float
    fits: bool
    memory_gb: float
    modes: dict[str, Mode]
    steps: int
    hours_per_epoch: float | None
    hours: float | None
    hours_of_experts: float | None
    validation: Pause
    previews: Pause
    stage_one_hours: float | None
    cache_gb: float
    checkpoints_gb: float
    untrained: list[str]
    too_short: str | None
    assumed: dict[str, str]
    probe: dict[str, Any] | None
    cards: list[CardFit] | None

    @property
    def exit_code(self) -> int:
        """0: a run that does not fit was still estimated."""
        return 0

    def lines(self) -> list[str]:
        """Format the figures as tables, with the assumptions."""
        unknown = "memory counted, time not known"
        predicted = "predicted, not measured" if self.seconds_per_step else unknown
        how = "measured by a probe" if self.measured else predicted
        sizes = ", ".join(f"{number:,} of {bucket}" for bucket, number in self.buckets.items())
        return [
            f"{self._model()} on {self.gpu} ({_size(self.memory_gb)} for a step), {how}",
            f"clips to train on: {sizes}",
            f"adapter: {self.lora}, {units.number(self.trained_parameters)} parameters",
            *self._weights(),
            *self._modes_table(),
            *self._batches_table(),
            "",
            *self._totals(),
            *(f"warning: {text}" for text in (*self.untrained, self.too_short) if text),
            "",
            *(f"assumed: {name}: {what}" for name, what in self.assumed.items()),
            *self._cards(),
        ]

    def _model(self) -> str:
        if self.num_experts == 1:
            return self.variant
        return f"{self.variant}, {f'{self.expert}-noise' if self.expert else 'one'} expert,"

    def _weights(self) -> list[str]:
        """Line of the frozen weights, if they are quantized or streamed."""
        words = [f"quantized to {self.quantize}"] if self.quantize != "none" else []
        if self.num_streamed:
            words.append(
                f"{units.count(self.num_streamed, 'block')} streamed from {_size(self.host_gb)} of "
                "host memory in each process"
            )
        return [f"frozen weights: {', '.join(words)}"] if words else []

    def _cards(self) -> list[str]:
        if self.cards is None:
            return []
        return [
            "",
            f"one clip per step on other cards, {self.lora}; predicted: the fastest that fits",
            *table(self.cards),
        ]

    def _modes_table(self) -> list[str]:
        rows = [
            (
                name,
                _size(mode.peak_gb),
                "yes" if mode.fits else "no",
                _time(mode.seconds_per_step),
                units.count(mode.longest, "frame") if mode.longest else "none",
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
        """Table of the steps by bucket; empty if there is only one bucket."""
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
            *self._both_experts(),
            f"stage one    {encode}",
            f"disk         {_size(self.cache_gb)} of cache, {_size(self.checkpoints_gb)} of "
            "checkpoints",
        ]
        return lines if self.fits else [*lines, self._does_not_fit()]

    def _both_experts(self) -> list[str]:
        """Line of the hours of all runs of a model with several transformers."""
        if self.num_experts == 1:
            return []
        return [
            f"both experts {_hours(self.hours_of_experts)}: a run for each, with this memory and "
            "time; two GPUs can train both at once"
        ]

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
        """Line of the bytes that a step sends; their time, a small part, is not in its seconds."""
        if self.num_processes == 1:
            return []
        sent = self.sent_bytes_per_step
        return [
            f"between GPUs {units.size(sent)} per step sent by each process, "
            f"{units.duration(sent / LINK_BYTES_PER_S)} at {units.size(LINK_BYTES_PER_S)}/s"
        ]


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else units.duration(seconds)


def _hours(hours: float | None) -> str:
    return "unknown time" if hours is None else units.duration(3600 * hours)


def _size(gigabytes: float) -> str:
    return units.size(1e9 * gigabytes)
