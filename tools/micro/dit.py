"""Pretrain the embedded model's DiT on cached latents of the drawn world.

Owns: the data it sees (`world.KNOWN` only), the loop and the optimizers. Its arithmetic
is that of stage two, training/flow.py.
Dimensions: n clips, b batch, c f h w latents, l text rows, d text.

Text has 512 rows, of which about twelve are not zero. The zero rows all have the same key, so one
row with log(number of zero rows) added to its score replaces them in the softmax. The output is the
same, for a third of the work.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor

from tools.micro.checkpoint import resume, save
from tools.micro.models import ROW
from tools.micro.vae import encode
from wanlora import progress
from wanlora.core.rng import Stream, generator
from wanlora.micro import world
from wanlora.training import flow
from wanlora.wan.encoders import TextEncoder, encode_prompts
from wanlora.wan.image_condition import model_input

logger = logging.getLogger(__name__)

TEXT_ROWS = 16
"""More than any caption of the world has, and a last one for the padding."""
EMPTY_PROMPT_SHARE = 0.1
SAVE_EVERY = 200


class Stage(NamedTuple):
    """A stretch of training from the averaged weights of the one before.

    Attributes:
        clips_per_concept: Clips of each known concept, seeds from 0.
        steps: Optimizer steps.
        batch: Clips per step.
        muon_rate: Learning rate of the blocks' matrices.
        adamw_rate: Learning rate of everything else.
        flat_share: Share of the steps at these rates; a cosine to zero follows.
        ema_decay: Decay of the average of the weights.
    """

    clips_per_concept: int
    steps: int
    batch: int
    muon_rate: float
    adamw_rate: float
    flat_share: float
    ema_decay: float


STAGES = (
    Stage(144, 2600, 24, 1.5e-2, 5e-3, 0.4, 0.998),
    Stage(576, 4700, 32, 1e-2, 3e-3, 0.3, 0.998),
)
"""After the first stage circles are ragged and hands float beside arms; the second corrects it."""


class Clips(NamedTuple):
    """Cached clips: normalised latents and their captions' embeddings.

    Attributes:
        latents: Of the clips.
        prompt_embeds: Of the clips' captions.
        empty: Of the empty prompt.
        condition: Latents of the first frames followed by zero frames; None for text to video.
    """

    latents: Float[Tensor, "n c f h w"]
    prompt_embeds: Float[Tensor, "n l d"]
    empty: Float[Tensor, "l d"]
    condition: Float[Tensor, "n c f h w"] | None = None


def raw_latents(
    vae: AutoencoderKLWan, concepts: Sequence[str], seeds: Sequence[int], batch: int = 4
) -> Float[Tensor, "n c f h w"]:
    """Encode drawn clips: every concept with every seed, concepts slowest."""
    chosen = [(concept, seed) for concept in concepts for seed in seeds]
    made = []
    with progress.bar(total=len(chosen), description="encode", unit="clip") as bar:
        for first in range(0, len(chosen), batch):
            some = chosen[first : first + batch]
            frames = torch.stack(
                [torch.from_numpy(world.draw(concept, seed).frames) for concept, seed in some]
            )
            with torch.no_grad():
                frames = frames.movedim(-1, 1).float().to(vae.device) / 127.5 - 1
                made.append(encode(vae, frames)[0].cpu())
            bar.update(len(some))
    return torch.cat(made)


def embed(text: TextEncoder, captions: Sequence[str]) -> Float[Tensor, "n l d"]:
    """Embed captions into `TEXT_ROWS` rows, zero past their length; equal captions once."""
    places = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    embeds = torch.zeros(len(places), TEXT_ROWS, ROW.shape.text_dim)
    for row, rows in zip(embeds, encode_prompts(text, list(places)), strict=True):
        assert len(rows) < TEXT_ROWS, len(rows)
        row[: len(rows)] = rows
    return embeds[[places[caption] for caption in captions]]


class _Padding:
    """Cross-attention in which the last row of text stands for all the padding."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._bias = torch.zeros(1, 1, 1, TEXT_ROWS)
        self._bias[..., -1] = math.log(ROW.shape.num_text_tokens - TEXT_ROWS + 1)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor,
        attention_mask: None = None, rotary_emb: None = None,
    ) -> Any:  # fmt: skip
        del attention_mask
        bias = self._bias.to(hidden_states.device)
        return self._processor(attn, hidden_states, encoder_hidden_states, bias, rotary_emb)


def shorten_text(transformer: WanTransformer3DModel) -> None:
    """Make a transformer take `TEXT_ROWS` rows of text for 512, with the same output."""
    for block in transformer.blocks:
        block.attn2.set_processor(_Padding(block.attn2.processor))


def loss_at(
    transformer: WanTransformer3DModel, latents: Tensor, prompt_embeds: Tensor, noise: Tensor,
    sigmas: Float[Tensor, " b"], condition: Tensor | None = None,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Loss per clip, as stage two computes it."""
    noisy = flow.mix(latents, noise, sigmas)
    prediction = transformer(
        noisy if condition is None else model_input(noisy, condition),
        timestep=flow.timesteps(sigmas),
        encoder_hidden_states=prompt_embeds,
        return_dict=False,
    )[0]
    return flow.loss_per_clip(prediction, flow.velocity_target(latents, noise))


def train(
    transformer: WanTransformer3DModel, clips: Clips, stage: Stage, checkpoint: Path, seed: int
) -> WanTransformer3DModel:
    """Train on the device it is on, from the checkpoint if there is one.

    Args:
        transformer: With `shorten_text` applied; trained in place.
        clips: Its data.
        stage: How long and how fast.
        checkpoint: File to continue from and to save to.
        seed: Seed of the order of clips, noise and sigmas.

    Returns:
        The averaged weights.
    """
    optimizers = _optimizers(transformer, stage)
    mean = torch.optim.swa_utils.get_ema_multi_avg_fn(stage.ema_decay)  # type: ignore[no-untyped-call]
    average = torch.optim.swa_utils.AveragedModel(transformer, multi_avg_fn=mean)
    rates = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, stage))
        for optimizer in optimizers
    ]
    parts: dict[str, Any] = {"transformer": transformer, "average": average}
    parts |= {f"optimizer{index}": part for index, part in enumerate(optimizers)}
    parts |= {f"rate{index}": part for index, part in enumerate(rates)}
    start = resume(checkpoint, parts)
    with progress.bar(total=stage.steps, description="dit", unit="step", done=start) as bar:
        for step in range(start, stage.steps):
            value = step_loss(transformer, clips, stage.batch, seed, step)
            transformer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.step()
                rate.step()
            average.update_parameters(transformer)
            bar.update()
            if step % 50 == 0:
                logger.info("dit step %d loss %.4f", step, value.item())
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
                save(checkpoint, parts, step + 1)
    averaged: WanTransformer3DModel = average.module
    return averaged


def step_loss(
    transformer: WanTransformer3DModel, clips: Clips, batch: int, seed: int, step: int
) -> Tensor:
    """Mean loss of a step's clips; a function of (seed, step)."""
    draws = generator(seed, Stream.ORDER, step)
    chosen = torch.from_numpy(draws.integers(len(clips.latents), size=batch))
    embeds = clips.prompt_embeds[chosen]
    embeds[torch.from_numpy(draws.random(batch) < EMPTY_PROMPT_SHARE)] = clips.empty
    # Stratified: a u in each of `batch` equal parts of (0, 1).
    strata = (draws.permutation(batch) + draws.random(batch)) / batch
    sigmas = torch.tensor([flow.shift_sigma(float(u), ROW.defaults.shift) for u in strata])
    latents = clips.latents[chosen]
    noise = torch.from_numpy(draws.standard_normal(latents.shape, dtype="float32"))
    condition = () if clips.condition is None else (clips.condition[chosen],)
    parts = (latents, embeds, noise, sigmas, *condition)
    return loss_at(transformer, *(part.to(transformer.device) for part in parts)).mean()


def _optimizers(
    transformer: WanTransformer3DModel, stage: Stage
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    blocks = [
        part
        for name, part in transformer.named_parameters()
        if name.startswith("blocks.") and part.ndim == 2
    ]
    in_blocks = {id(part) for part in blocks}
    rest = [part for part in transformer.parameters() if id(part) not in in_blocks]
    return (
        torch.optim.Muon(blocks, lr=stage.muon_rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=stage.adamw_rate, betas=(0.9, 0.99), weight_decay=0.0),
    )


def _rate(step: int, stage: Stage) -> float:
    done = step / stage.steps
    falling = max(0.0, done - stage.flat_share) / (1 - stage.flat_share)
    return min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * falling))
