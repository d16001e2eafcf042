"""Result of `wanlora train`: its JSON document, its text and its exit code.

Owns: the fields and lines of the result. Must not know: how a run is trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora.commands.train.reporting import Reporter
from wanlora.commands.train.session import Session
from wanlora.core.intervals import conclusion
from wanlora.cost.seconds import all_reduce_bytes
from wanlora.runs import run_folder
from wanlora.training.validation import EMA


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        sent_bytes_per_step: Bytes that each process sends to sum the adapter's gradient.
        stopped: Reason why it ended before its last step: a signal's name, "no new best", or None.
        validation: Last row of validation.jsonl for the adapter on held-out clips.
        best: Row of validation.jsonl for the adapter in `best/`; its `weights` are `adapter` or
            `ema`.
        starts_from_image: True for an image-to-video model.
    """

    output_dir: str
    adapter: str
    steps: int
    resumed_from: int
    trainable_parameters: int
    last_loss: float | None
    seconds: float
    seconds_per_step: float | None
    num_processes: int
    sent_bytes_per_step: int
    clips_per_s: float | None
    stopped: str | None
    best_step: int | None
    validation: dict[str, Any] | None
    best: dict[str, Any] | None
    starts_from_image: bool = False

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number, as in shells."""
        return {"SIGINT": 130, "SIGTERM": 143}.get(self.stopped or "", 0)

    def lines(self) -> list[str]:
        """Format the result and the next command."""
        lines = [f"{self.output_dir} is already at step {self.steps}; nothing was trained"]
        if self.last_loss is not None:
            lines = [
                f"trained steps {self.resumed_from} to {self.steps - 1} in {self.seconds:.1f} s "
                f"({self.seconds_per_step:.3f} s/step, {self.clips_per_s:.2f} clips/s), "
                f"last loss {self.last_loss:.4f}"
            ]
        if self.stopped:
            go_on = run_folder.resume_command(Path(self.output_dir))
            lines.append(f"stopped early: {self.stopped}; continue with: {go_on}")
        if self.best:
            change = 100 * self.best["difference"] / self.best["base_mean"]
            found = conclusion(self.best["ci95"], self.best.get("num_groups"))
            lines.append(
                f"best held-out loss after {self.best['step']} steps"
                f"{' (moving average)' if self.best['weights'] == EMA else ''}: "
                f"{self.best['mean']:.4f}, {change:+.2f} % against the base ({found}): "
                f"{self.output_dir}/best"
            )
        image = "--image photo.jpg " if self.starts_from_image else ""
        return [
            *lines,
            f"adapter: {self.adapter}",
            f'next: wanlora sample --adapter {self.output_dir} {image}--prompt "..."',
            "for ComfyUI, which does not read this file: wanlora export --adapter "
            f"{self.output_dir} --format comfyui --output "
            f"{Path(self.output_dir).resolve().name}.safetensors",
        ]


def result_of(
    session: Session, reporter: Reporter, *, first_step: int, stopped: str | None, seconds: float
) -> TrainResult:
    """Gather the result of a run.

    Args:
        session: The run.
        reporter: Its record.
        first_step: Step that this process started at.
        stopped: Reason why it ended before its last step, or None.
        seconds: Time of the loop.
    """
    run, num_parameters = session.run, session.model.masters.flat_gradient.numel()
    num_done = run.progress.step - first_step
    return TrainResult(
        output_dir=str(run.folder),
        adapter=str(run.folder / run_folder.ADAPTER_NAME),
        steps=run.progress.step,
        resumed_from=first_step,
        trainable_parameters=num_parameters,
        last_loss=reporter.last_loss,
        seconds=seconds,
        seconds_per_step=seconds / num_done if num_done else None,
        num_processes=session.ranks.count,
        sent_bytes_per_step=all_reduce_bytes(num_parameters, session.ranks.count),
        clips_per_s=reporter.num_clips / seconds if num_done else None,
        stopped=stopped,
        best_step=run.progress.best_step,
        validation=reporter.last_validation,
        best=reporter.best_validation(),
        starts_from_image=session.model.variant.is_i2v,
    )
