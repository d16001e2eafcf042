"""The validation loss of a run: held-out and training clips, with the adapter and without it.

Owns: which clips are validated on, and the record of it in the run's folder. The arithmetic is in
`core.validation`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float

from wanlora.core import flow
from wanlora.core.fingerprint import fingerprint
from wanlora.core.rng import Stream, normal
from wanlora.core.validation import (
    Report,
    choose,
    describe_sample,
    sigma_grid,
    summarize,
)
from wanlora.progress import waiting
from wanlora.step.batches import BatchSource, MicroBatch
from wanlora.step.predict import predict
from wanlora.store.views import ViewClip


@dataclass(frozen=True)
class Panel:
    """Fixed clips and noise levels. A number of one panel compares with any other of it.

    Attributes:
        name: "val" or "train": which curve it is.
        clips: The clips, with their place in the panel as the slot of their noise.
        sigmas: Rising.
    """

    name: str
    clips: tuple[ViewClip, ...]
    sigmas: tuple[float, ...]

    def key(self, source: BatchSource, dtype: torch.dtype) -> str:
        """Identity of the base's losses on this panel."""
        clips = [[clip.key, clip.prompts[0]] for clip in self.clips]
        return fingerprint([clips, list(self.sigmas), source.seed, str(dtype)])


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
    grid = sigma_grid(num_sigmas, sampler=source.sampler, shift=source.shift)
    return Panel(name, tuple(clips[index] for index in chosen), tuple(grid))


def validate(
    panel: Panel,
    transformer: Any,
    source: BatchSource,
    base_losses: dict[str, list[list[float]]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rank: int = 0,
    num_ranks: int = 1,
    meet: Callable[[], None] | None = None,
) -> Report:
    """Measure a panel with the adapter, beside the base without it.

    Args:
        panel: What to measure on.
        transformer: With its adapter.
        source: Where latents, prompts and the seed come from.
        base_losses: The base's losses by panel; filled with what is missing.
        device: Where to compute.
        dtype: The transformer's type.
        rank: This process.
        num_ranks: Processes that share the clips; all must call together.
        meet: Waits for all processes, and names a lost one.
    """
    share: Any = {"device": device, "dtype": dtype, "rank": rank, "num_ranks": num_ranks}
    share["meet"] = meet
    key = panel.key(source, dtype)
    if key not in base_losses:
        pairs = f"{len(panel.clips)} clips at {len(panel.sigmas)} noise levels"
        with waiting(f"measuring the base model on {pairs}"), _without_adapter(transformer):
            base_losses[key] = losses(panel, transformer, source, **share).tolist()
    return summarize(
        losses(panel, transformer, source, **share),
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
    meet: Callable[[], None] | None = None,
) -> Float[np.ndarray, "n q"]:
    """Loss of each clip at each sigma, as the model stands; ranks share the clips."""
    table = torch.zeros(len(panel.clips), len(panel.sigmas), device=device)
    for row in range(rank, len(panel.clips), num_ranks):
        clip = panel.clips[row]
        latents = source.latents(clip)[None]
        prompt = source.padded_prompt(clip.prompts[0])[None]
        for column, sigma in enumerate(panel.sigmas):
            noise = normal(source.seed, Stream.VALIDATION, row, column, tuple(latents.shape[1:]))
            batch = MicroBatch(
                (clip.clip_id,), latents, torch.from_numpy(noise)[None], torch.tensor([sigma]),
                torch.ones(1), prompt,
            )  # fmt: skip
            prediction, target = predict(transformer, batch, device, dtype)
            table[row, column] = flow.loss_per_clip(prediction, target)[0]
    if num_ranks > 1:  # every cell is one rank's, the others hold 0
        if meet:
            meet()  # names a lost rank, for which the collective would wait
        dist.all_reduce(table)
    return table.cpu().double().numpy()  # float64 on the host alone: MPS does not have it


def record(step: int, panel: Panel, report: Report) -> dict[str, Any]:
    """One line of validation.jsonl."""
    return {"step": step, "split": panel.name, **asdict(report)}


def describe(panel: Panel, report: Report) -> str:
    """Loss and its difference to the base's, in one line."""
    change = 100 * report.difference / report.base_mean
    interval = (
        f", 95 % interval {100 * report.ci95[0] / report.base_mean:+.2f} to "
        f"{100 * report.ci95[1] / report.base_mean:+.2f} %"
        if report.ci95
        else ""
    )
    sample = describe_sample(report.num_clips, report.num_groups)
    return (
        f"{panel.name} loss {report.mean:.4f}, base {report.base_mean:.4f} ({change:+.2f} %"
        f"{interval}; {sample}; {len(panel.sigmas)} sigmas)"
    )


@contextmanager
def _without_adapter(transformer: Any) -> Iterator[None]:
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
