"""Trial of the most expensive micro-batch before training: memory, kernels, seconds.

Owns: forward and backward passes on random values, and their measurements.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from wanlora.core.buckets import Bucket, latent_shape
from wanlora.core.out_of_memory import is_out_of_memory, reason_of
from wanlora.progress import waiting
from wanlora.training.batches import MicroBatch
from wanlora.training.predict import predict
from wanlora.training.workload import Modes, Trial, describe
from wanlora.wan import attention
from wanlora.wan.blocks import set_activations

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 120
"""Tokens of a random prompt; the rest of the 512 are zeros, as in a real one."""
PROMPT_STD = 0.2
"""Standard deviation of a random prompt's embedding, about that of UMT5's output."""
FACTOR_MAX = 1e-2
"""Largest value of A and B during the trial."""


def random_batch(
    bucket: Bucket,
    batch_size: int,
    *,
    num_channels: int,
    text_shape: tuple[int, int],
    has_condition: bool = False,
    image_shape: tuple[int, int] | None = None,
) -> MicroBatch:
    """Make a micro-batch of a bucket: normal latents and noise, prompts of PROMPT_TOKENS tokens.

    Zeros would not do: a kernel may return NaN only for real values, and a GPU is faster on zeros.

    Args:
        bucket: Size of the clips.
        batch_size: Number of clips.
        num_channels: Channels of the latents.
        text_shape: Tokens of a prompt, and their width.
        has_condition: True for an image-to-video transformer.
        image_shape: Tokens of an image, and their width, if the transformer reads them.
    """
    draws = torch.Generator().manual_seed(0)
    shape = (batch_size, *latent_shape(bucket, num_channels))
    prompts = torch.zeros(batch_size, *text_shape)
    prompts[:, :PROMPT_TOKENS].normal_(std=PROMPT_STD, generator=draws)
    latents, noise = (torch.randn(shape, generator=draws) for _ in range(2))
    return MicroBatch(
        ("",) * batch_size, latents, noise, torch.full((batch_size,), 0.5),
        torch.ones(batch_size), prompts,
        condition=torch.randn(shape, generator=draws) if has_condition else None,
        image_embeds=(
            torch.randn(batch_size, *image_shape, generator=draws) if image_shape else None
        ),
    )  # fmt: skip


def try_modes(
    transformer: Any,
    batch: MicroBatch,
    choices: Sequence[Modes],
    *,
    compiled: bool,
    device: torch.device,
    dtype: torch.dtype,
    passes: int = 1,
) -> Trial:
    """Run a micro-batch forward and backward with the first choice of modes that fits into memory.

    Args:
        transformer: Transformer with its adapter; its blocks keep the modes that fitted.
        batch: Batch from `random_batch`.
        choices: Modes of the blocks, the fastest first; each takes more time and less memory than
            the one before.
        compiled: True if blocks are compiled.
        device: Device to compute on.
        dtype: The transformer's type.
        passes: Timed passes, after the first one.

    Raises:
        torch.OutOfMemoryError: Not even the last choice fits.
    """
    for modes in choices:
        set_activations(transformer, modes, compiled=compiled)
        gc.collect()  # a failed pass leaves its activations in reference cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with (
                waiting(f"trying it with activations {describe(modes)}"),
                _nonzero_factors(transformer),
            ):
                return _try(transformer, batch, modes, device, dtype, passes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = reason_of(error)
        logger.warning("out of memory with activations %s (%s)", describe(modes), reason)
    raise torch.OutOfMemoryError(reason)


def _try(
    transformer: Any,
    batch: MicroBatch,
    modes: Modes,
    device: torch.device,
    dtype: torch.dtype,
    passes: int,
) -> Trial:
    def once() -> None:
        prediction, _ = predict(transformer, batch, device, dtype)
        torch.autograd.backward(prediction.float().square().mean())

    try:
        once()  # compiles; runs out of memory, if at all
        non_finite = _non_finite(transformer)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with attention.watched() as operators:
            seconds = sorted(timed(once, device) for _ in range(passes))
        return Trial(
            modes=modes,
            seconds=seconds[passes // 2],
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            attention=tuple(sorted(operators)),
            non_finite=non_finite,
        )
    finally:
        for parameter in transformer.parameters():
            parameter.grad = None


@contextmanager
def _nonzero_factors(transformer: Any) -> Iterator[None]:
    """Give A and B fixed values inside the block, and restore their own after it.

    With B = 0, as in a new adapter, the gradient of A is 0 with any kernel; and an adapter that has
    diverged gives NaN with any kernel.
    """
    factors = [
        (parameter, parameter.detach().to("cpu", copy=True))
        for name, parameter in transformer.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    ]
    with torch.no_grad():
        for parameter, _ in factors:
            values = torch.linspace(-FACTOR_MAX, FACTOR_MAX, parameter.numel())
            parameter.copy_(values.view_as(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, own in factors:
                parameter.copy_(own)


def _non_finite(transformer: Any) -> tuple[str, ...]:
    return tuple(
        name
        for name, parameter in transformer.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    )


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that an action takes on a device, its queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
