"""What a run writes while it trains: checkpoints, the newest, best and averaged adapter.

Owns: which file appears when. How it appears is `runs`' and `files`' business.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from wanlora import runs
from wanlora.config import TrainConfig
from wanlora.files import write_atomic, writing
from wanlora.train import checkpoints
from wanlora.train.session import Session
from wanlora.wan.adapter import save_adapter


def save(config: TrainConfig, session: Session) -> None:
    """Publish a checkpoint, then its adapters at the root of the run."""

    def write(folder: Path) -> None:
        _write_adapter(folder, session, session.masters.parameters)
        if session.average:
            _write_adapter(folder / runs.EMA_NAME, session, session.average.tensors)
        checkpoints.write_state(
            folder,
            progress=session.progress,
            identity=session.identity,
            facts=session.facts,
            masters=session.masters,
            optimizer=session.optimizer,
        )

    checkpoint = runs.publish_checkpoint(
        config.output_dir, session.progress.step, write, keep=config.keep_checkpoints
    )
    show(config.output_dir, checkpoint)


def show(run_dir: Path, checkpoint: Path) -> None:
    """Copy a checkpoint's adapters to the root of the run, where diffusers looks for them.

    Also done when a run continues: it may have been killed between publishing and this.
    """
    for part in (Path(), Path(runs.EMA_NAME)):
        source, target = checkpoint / part / runs.ADAPTER_NAME, run_dir / part / runs.ADAPTER_NAME
        if not source.exists():
            continue
        data = source.read_bytes()
        if target.exists() and target.read_bytes() == data:
            continue
        with writing(target, then=f"continue with --resume; checkpoint {checkpoint} is complete"):
            target.parent.mkdir(exist_ok=True)
            write_atomic(target, data)


def save_best(config: TrainConfig, session: Session) -> None:
    """Write the adapter of the best validation so far; the average, where one is kept."""
    tensors = session.average.tensors if session.average else session.masters.parameters
    _write_adapter(config.output_dir / runs.BEST_NAME, session, tensors)


def is_due(config: TrainConfig, session: Session) -> bool:
    """Whether a checkpoint is due now, after `session.progress.step` steps."""
    done = session.progress.step
    if done == session.end_step or (config.save_steps and done % config.save_steps == 0):
        return True
    epoch = session.data.source.order.steps_per_epoch
    ends_epoch = done // epoch > (done - 1) // epoch
    return config.save_every_epoch and ends_epoch


def _write_adapter(folder: Path, session: Session, tensors: Mapping[str, Tensor]) -> None:
    save_adapter(
        folder / runs.ADAPTER_NAME,
        tensors,
        session.shape,
        provenance=session.facts | {"step": str(session.progress.step)},
    )
