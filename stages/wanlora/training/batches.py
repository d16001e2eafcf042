"""Micro-batches from a view and a store, read ahead of the step.

Owns: which clip, sigma, noise, prompt and condition a slot of a step gets. All are functions of
(seed, step, slot); each rank has its slice of the slots. Legend: B micro-batch, C F H W latents,
L tokens (512), D text width, M image tokens (257), E image width.
"""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wanlora.core.buckets import TEMPORAL_FACTOR, Bucket
from wanlora.core.kinds import Kind
from wanlora.core.rng import Stream, generator, normal, uniform
from wanlora.store.reader import StoreReader
from wanlora.store.views import ViewClip
from wanlora.training import flow
from wanlora.training.order import Order
from wanlora.wan.device import current_in_thread

READ_THREADS = 2


class MicroBatch(NamedTuple):
    """Inputs of one forward pass, in fp32.

    Attributes:
        condition: Latents of each clip's first frame followed by grey frames; None for text to
            video.
        image_embeds: Embeddings of each clip's first frame; None if the transformer reads none.
        dropped: True for each clip that is trained without its condition; None if no clip is.
        uploaded: None on the CPU; on a GPU, call `wait` before the tensors are used.
    """

    clip_ids: tuple[str, ...]
    latents: Float[Tensor, "b c f h w"]
    noise: Float[Tensor, "b c f h w"]
    sigmas: Float[Tensor, " b"]
    weights: Float[Tensor, " b"]
    prompt_embeds: Float[Tensor, "b l d"]
    condition: Float[Tensor, "b c f h w"] | None = None
    image_embeds: Float[Tensor, "b m e"] | None = None
    dropped: Bool[Tensor, " b"] | None = None
    uploaded: torch.cuda.Event | None = None

    def upload(self, stream: torch.cuda.Stream) -> "MicroBatch":
        """Copy to the stream's GPU from pinned memory, while that GPU computes."""
        with torch.cuda.stream(stream):
            tensors = {
                name: tensor.pin_memory().to(stream.device, non_blocking=True)
                for name, tensor in self._tensors().items()
            }
            changed: dict[str, Any] = {**tensors, "uploaded": stream.record_event()}
            return self._replace(**changed)

    def wait(self) -> "MicroBatch":
        """Let the GPU's current stream, not this process, wait for the upload."""
        if self.uploaded is not None:
            current = torch.cuda.current_stream(self.latents.device)
            current.wait_event(self.uploaded)
            for tensor in self._tensors().values():
                tensor.record_stream(current)  # else its memory could be reused for the next upload
        return self

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._asdict().items() if torch.is_tensor(value)}


@dataclass(frozen=True)
class BatchSource:
    """Source of the content of every slot of every step.

    Args:
        reader: The open store.
        clips: The clips of each bucket, in the view's order.
        order: Selects the clips of a step's global batch.
        seed: The run's seed.
        sampler: A key of `flow.SAMPLERS`.
        shift: Shift of sigma.
        sigmas: Range of sigma.
        weighting: A key of `flow.WEIGHTINGS`.
        caption_dropout: Probability of the empty prompt.
        empty_prompt: Key of the empty prompt.
        sequence_length: Rows the prompt embeddings are padded to (512: part of the model).
        kinds: Kinds of rows that the transformer reads.
        condition_dropout: Probability that a clip is trained without its condition.
    """

    reader: StoreReader
    clips: dict[Bucket, list[ViewClip]]
    order: Order
    seed: int
    sampler: str
    shift: float
    sigmas: flow.Range
    weighting: str
    caption_dropout: float
    empty_prompt: str
    sequence_length: int
    kinds: tuple[Kind, ...] = ("latents", "text")
    condition_dropout: float = 0.0

    def read(self, step: int, slots: Sequence[int]) -> MicroBatch:
        """Assemble the micro-batch of some slots of a step's global batch."""
        bucket, indices = self.order.batch(step)
        clips = [self.clips[bucket][indices[slot]] for slot in slots]
        latents = [self.latents(clip) for clip in clips]
        sigmas = [self.sigma(step, slot) for slot in slots]
        return MicroBatch(
            clip_ids=tuple(clip.clip_id for clip in clips),
            latents=torch.stack(latents),
            noise=torch.from_numpy(
                np.stack(
                    [
                        normal(self.seed, Stream.NOISE, step, slot, tuple(tensor.shape))
                        for slot, tensor in zip(slots, latents, strict=True)
                    ]
                )
            ),
            sigmas=torch.tensor(sigmas, dtype=torch.float32),
            weights=torch.tensor(
                [flow.WEIGHTINGS[self.weighting](sigma) for sigma in sigmas], dtype=torch.float32
            ),
            prompt_embeds=torch.stack(
                [
                    self.padded_prompt(self._prompt_key(clip, step, slot))
                    for clip, slot in zip(clips, slots, strict=True)
                ]
            ),
            **self.conditions(clips),
            dropped=self._dropped(step, slots),
        )

    def latents(self, clip: ViewClip) -> Float[Tensor, "c f h w"]:
        """Latents of a clip in fp32; only its first frames if its bucket has fewer than cached."""
        return _first_frames(self.reader.latents(clip.key), clip)

    def condition(self, clip: ViewClip) -> Float[Tensor, "c f h w"]:
        """Latents of a clip's first frame followed by grey frames, in fp32; shortened the same.

        The VAE is causal, so those of fewer frames are the first ones of those of more.
        """
        return _first_frames(self.reader.cond_latents(clip.key), clip)

    def image_embeds(self, clip: ViewClip) -> Float[Tensor, "m e"]:
        """Embeddings of a clip's first frame in fp32."""
        return torch.from_numpy(self.reader.clip_vision(clip.key).astype(np.float32))

    def conditions(self, clips: Sequence[ViewClip]) -> dict[str, Any]:
        """Tensors of a micro-batch of image to video, by its field; empty for text to video."""
        fields = {}
        if "cond_latents" in self.kinds:
            fields["condition"] = torch.stack([self.condition(clip) for clip in clips])
        if "clip_vision" in self.kinds:
            fields["image_embeds"] = torch.stack([self.image_embeds(clip) for clip in clips])
        return fields

    def _dropped(self, step: int, slots: Sequence[int]) -> Bool[Tensor, " b"] | None:
        """Draw the clips without their condition, from a stream that nothing else uses."""
        if not self.condition_dropout:
            return None
        draws = [uniform(self.seed, Stream.CONDITION, step, slot) for slot in slots]
        return torch.tensor([draw < self.condition_dropout for draw in draws])

    def sigma(self, step: int, slot: int) -> float:
        """Noise level of a slot."""
        u = uniform(self.seed, Stream.SIGMA, step, slot)
        return flow.sigma_of(u, sampler=self.sampler, shift=self.shift, sigmas=self.sigmas)

    def describe(self, step: int, slot: int) -> str:
        """Name a slot's clip and sigma, for messages."""
        bucket, indices = self.order.batch(step)
        return f"{self.clips[bucket][indices[slot]].clip_id} at sigma {self.sigma(step, slot):.3f}"

    def padded_prompt(self, key: str) -> Float[Tensor, "l d"]:
        """Prompt embeddings of a key, zero past their length, as the transformer reads them."""
        return self.padded(self.reader.prompt_embeds(key))

    def padded(self, rows: Float[np.ndarray, "n d"]) -> Float[Tensor, "l d"]:
        """Prompt embeddings in fp32, zero past their length."""
        padded = np.zeros((self.sequence_length, rows.shape[1]), np.float32)
        padded[: len(rows)] = rows
        return torch.from_numpy(padded)

    def _prompt_key(self, clip: ViewClip, step: int, slot: int) -> str:
        """Key of the clip's caption, drawn if there are several, or of the empty prompt."""
        draws = generator(self.seed, Stream.DROPOUT, step, slot)
        if draws.random() < self.caption_dropout:
            return self.empty_prompt
        return clip.prompts[int(draws.integers(len(clip.prompts)))]


def _first_frames(rows: Float[np.ndarray, "c f h w"], clip: ViewClip) -> Float[Tensor, "c n h w"]:
    frames = 1 + (clip.bucket.num_frames - 1) // TEMPORAL_FACTOR
    return torch.from_numpy(rows[:, :frames].astype(np.float32))


def read_ahead(
    source: BatchSource,
    plan: Iterable[tuple[int, tuple[int, ...]]],
    *,
    depth: int,
    device: torch.device,
) -> Generator["Future[MicroBatch]"]:
    """Yield micro-batches in order, and read up to `depth` of them ahead in threads.

    Threads, not processes: reading a clip is a few milliseconds of decompression without the GIL.
    For a GPU they are also uploaded, on a separate stream.

    Args:
        source: Source of the micro-batches.
        plan: One (step, slots) per micro-batch.
        depth: Maximum number of micro-batches that are read ahead.
        device: Device of the transformer.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def read(step: int, slots: tuple[int, ...]) -> MicroBatch:
        batch = source.read(step, slots)
        return batch.upload(stream) if stream else batch

    pending: deque[Future[MicroBatch]] = deque()
    todo = iter(plan)
    with ThreadPoolExecutor(
        READ_THREADS, thread_name_prefix="read-ahead", initializer=current_in_thread(device)
    ) as pool:
        try:
            for step, slots in todo:
                pending.append(pool.submit(read, step, slots))
                if len(pending) > depth:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for future in pending:
                future.cancel()
