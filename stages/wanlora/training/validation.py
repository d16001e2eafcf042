"""The validation loss of a run on held-out and training clips, with and without the adapter.

Owns: the clips that are validated on, and a row of validation.jsonl. `training.panel` has the
arithmetic.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float

from wanlora.core.fingerprint import fingerprint
from wanlora.core.intervals import describe_change, describe_sample
from wanlora.core.kinds import Kind
from wanlora.core.rng import Stream, normal
from wanlora.cost.memory import Quantize
from wanlora.errors import NonFiniteError
from wanlora.progress import waiting
from wanlora.store.views import View, ViewClip
from wanlora.training import flow
from wanlora.training.batches import BatchSource, MicroBatch
from wanlora.training.flow import sigma_grid
from wanlora.training.panel import Report, choose, summarize
from wanlora.training.predict import predict

ADAPTER, EMA = "adapter", "ema"
"""Weights that a loss can belong to: those being trained, and their moving average."""

StopSignal = Callable[[], int]
"""Number of the signal that requests a stop; 0 without one."""


class ValidationStopped(Exception):  # noqa: N818  (a request, not an error)
    """A validation ended before it was complete, because a process received a signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@dataclass(frozen=True)
class Panel:
    """Fixed clips and noise levels. Two losses of one panel can be compared.

    Attributes:
        name: Curve of the panel: "val" or "train".
        clips: The clips, with their place in the panel as the slot of their noise.
        sigmas: Noise levels, rising.
    """

    name: str
    clips: tuple[ViewClip, ...]
    sigmas: tuple[float, ...]

    def key(self, source: BatchSource, facts: Mapping[str, Any]) -> str:
        """Fingerprint of everything that decides a loss on this panel, except the adapter.

        Losses may be compared, and the base's reused, only under the same key.

        Args:
            source: Its seed decides the noise.
            facts: Base model, encoders and number format; see `panel_facts`.
        """
        clips = [
            [clip.key, clip.prompts[0], str(clip.bucket), clip.source_group] for clip in self.clips
        ]
        return fingerprint([clips, list(self.sigmas), source.seed, dict(facts)])


def panel_facts(
    view: View,
    base: str,
    *,
    kinds: Sequence[Kind],
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = "none",
) -> dict[str, str]:
    """Facts for `Panel.key`.

    Args:
        view: View whose fingerprints identify the encoders.
        base: Fingerprint of the transformer's weights.
        kinds: Kinds of rows that the transformer reads.
        dtype: The transformer's type.
        device: Device that computes the losses; rounding differs between kinds of devices.
        quantize: Format of the weights in the transformer's blocks.
    """
    return {
        "base": base,
        **{kind: view.fingerprint(kind) for kind in kinds},
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        **({"quantize": quantize} if quantize != "none" else {}),
    }


def make_panel(
    name: str, clips: Sequence[ViewClip], source: BatchSource, *, num_clips: int, num_sigmas: int
) -> Panel | None:
    """Choose the panel of a split, evenly over activities, from different source groups first.

    None when the split is empty.
    """
    if not clips:
        return None
    activities, groups = zip(*((clip.activity, clip.source_group) for clip in clips), strict=True)
    chosen = choose(activities, groups, num_clips, seed=source.seed)
    grid = sigma_grid(num_sigmas, sampler=source.sampler, shift=source.shift, sigmas=source.sigmas)
    return Panel(name, tuple(clips[index] for index in chosen), tuple(grid))


def measure(
    panel: Panel,
    transformer: Any,
    source: BatchSource,
    base_losses: dict[str, list[list[float]]],
    *,
    key: str,
    device: torch.device,
    dtype: torch.dtype,
    rank: int = 0,
    num_ranks: int = 1,
    stop: StopSignal = int,
    barrier: Callable[[], None] | None = None,
) -> Report:
    """Measure a panel with the adapter, beside the base without it.

    Args:
        panel: Clips and noise levels.
        transformer: Transformer with its adapter.
        source: Source of latents, prompts and the seed.
        base_losses: The base's losses by panel key; missing ones are added.
        key: Key of the panel.
        device: Device to compute on.
        dtype: The transformer's type.
        rank: This process.
        num_ranks: Processes that share the clips; all must call together.
        stop: See `losses`.
        barrier: Waits for all processes, and names a lost one.

    Raises:
        NonFiniteError: A loss is NaN or infinite.
        ValidationStopped: A process received a signal.
    """
    share: Any = {
        "device": device, "dtype": dtype, "rank": rank, "num_ranks": num_ranks, "stop": stop,
        "barrier": barrier,
    }  # fmt: skip
    if key not in base_losses:
        pairs = f"{len(panel.clips)} clips at {len(panel.sigmas)} noise levels"
        with waiting(f"measuring the base model on {pairs}"), _without_adapter(transformer):
            base = losses(panel, transformer, source, **share)
        require_finite(panel, base, "the base model")
        base_losses[key] = base.tolist()
    table = losses(panel, transformer, source, **share)
    require_finite(panel, table, "the adapter")
    return summarize(
        table,
        np.array(base_losses[key]),
        sigmas=panel.sigmas,
        activities=[clip.activity for clip in panel.clips],
        groups=[clip.source_group for clip in panel.clips],
    )


@torch.no_grad()
def losses(
    panel: Panel,
    transformer: Any,
    source: BatchSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rank: int = 0,
    num_ranks: int = 1,
    stop: StopSignal = int,
    barrier: Callable[[], None] | None = None,
) -> Float[np.ndarray, "n q"]:
    """Loss of each clip at each sigma with the transformer's current weights.

    Args:
        panel: Clips and noise levels.
        transformer: Transformer with or without an adapter.
        source: Source of latents, prompts and the seed.
        device: Device to compute on.
        dtype: The transformer's type.
        rank: This process.
        num_ranks: Processes that share the clips; all must call together.
        stop: Checked before each forward pass.
        barrier: Waits for all processes, and names a lost one.

    Raises:
        ValidationStopped: `stop` returned a signal in any process; all processes raise it.
    """
    table = torch.zeros(len(panel.clips), len(panel.sigmas), device=device)
    for row in range(rank, len(panel.clips), num_ranks):
        if stop():
            break
        clip = panel.clips[row]
        latents = source.latents(clip)[None]
        prompt = source.padded_prompt(clip.prompts[0])[None]
        conditions = source.conditions([clip])
        for column, sigma in enumerate(panel.sigmas):
            if stop():
                break
            noise = normal(source.seed, Stream.VALIDATION, row, column, tuple(latents.shape[1:]))
            batch = MicroBatch(
                (clip.clip_id,), latents, torch.from_numpy(noise)[None], torch.tensor([sigma]),
                torch.ones(1), prompt, **conditions,
            )  # fmt: skip
            prediction, target = predict(transformer, batch, device, dtype)
            table[row, column] = flow.loss_per_clip(prediction, target)[0]
    if num_ranks > 1:  # each cell is computed by one rank; the others have 0
        if barrier:
            barrier()  # names a lost rank; the collective would wait for it
        dist.all_reduce(table)
    _raise_if_stopped(stop(), device, num_ranks)
    return table.cpu().double().numpy()  # float64 only on the host: MPS does not have it


def require_finite(panel: Panel, table: Float[np.ndarray, "n q"], model: str) -> None:
    """Refuse a table with a loss that is NaN or infinite.

    Args:
        panel: Panel whose clips and sigmas are the rows and columns of the table.
        table: Table from `losses`.
        model: Name of the measured model, for the message.

    Raises:
        NonFiniteError: Names the first clip and sigma.
    """
    if not np.isfinite(table).all():
        row, column = (int(place[0]) for place in np.nonzero(~np.isfinite(table)))
        raise NonFiniteError(
            f"the loss of {model} on {panel.name} clip {panel.clips[row].clip_id} at sigma "
            f"{panel.sigmas[column]:.3f} is {table[row, column]}: either its weights are wrong, or "
            "the cached clip is (wanlora inspect CACHE --verify)"
        )


def record(
    step: int, panel: Panel, report: Report, *, key: str, weights: str = ADAPTER
) -> dict[str, Any]:
    """One line of validation.jsonl.

    Args:
        step: Steps done.
        panel: Clips and noise levels.
        report: Its losses.
        key: Key of the panel.
        weights: `ADAPTER` or `EMA`.
    """
    return {
        "step": step, "split": panel.name, "weights": weights, "panel": key, **asdict(report)
    }  # fmt: skip


def describe(panel: Panel, report: Report, *, weights: str = ADAPTER) -> str:
    """Format the loss and its difference from the base's in one line."""
    change = describe_change(report.difference, report.base_mean, report.ci95)
    sample = describe_sample(report.num_clips, report.num_groups)
    return (
        f"{panel.name} loss{' of the moving average' if weights == EMA else ''} "
        f"{report.mean:.4f}, base {report.base_mean:.4f} ({change}; "
        f"{sample}; {len(panel.sigmas)} sigmas)"
    )


def _raise_if_stopped(signal_number: int, device: torch.device, num_ranks: int) -> None:
    if num_ranks > 1:
        flag = torch.tensor(signal_number, dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        signal_number = int(flag.item())
    if signal_number:
        raise ValidationStopped(signal_number)


@contextmanager
def _without_adapter(transformer: Any) -> Iterator[None]:
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
