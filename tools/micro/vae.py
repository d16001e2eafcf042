"""Train the embedded model's VAE on the drawn world.

Owns: the loss, the phases, and encoding and decoding a whole clip at once. diffusers' `encode` goes
four frames at a time, and its `decode` clamps, which kills gradients; the functions here compute
the same values (a test says so) in one pass.

What makes it learn at all: the norms after a convolution remove a constant colour's brightness, so
the first convolution has a bias that is not small; convolutions over time start as the identity,
and single frames come first. Dimensions: b c t h w.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tools.micro.checkpoint import resume, save
from wanlora import progress
from wanlora.core.rng import Stream, generator
from wanlora.micro import world

logger = logging.getLogger(__name__)

KL_WEIGHT = 2e-4
FOREGROUND_WEIGHT, MOTION_WEIGHT = 4.0, 7.0
POOL_PER_CONCEPT = 160
SAVE_EVERY = 100


class Phase(NamedTuple):
    """A stretch of training: crops of `num_frames` x `size_px`², so many at a time."""

    num_frames: int
    size_px: int
    batch: int
    steps: int


class Schedule(NamedTuple):
    """Phases in order, and the learning rates they start from; they fall as a cosine over all."""

    phases: tuple[Phase, ...]
    muon_rate: float = 1.5e-2
    adamw_rate: float = 2e-3

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)


SCHEDULE = Schedule(
    (Phase(1, 32, 16, 300), Phase(9, 32, 4, 2400), Phase(17, 32, 4, 2000), Phase(17, 64, 1, 1300))
)


def initialise(vae: AutoencoderKLWan, seed: int) -> None:
    """Draw weights that training can start from."""
    torch.manual_seed(seed)
    for name, parameter in vae.named_parameters():
        if "norm" in name or name.endswith("gamma"):
            continue
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(math.prod(parameter.shape[1:])))
        if name.endswith("conv2.weight"):
            parameter.data *= 0.3
        if "time_conv" in name and name.endswith("weight"):
            _identity(parameter)
    for part in (vae.encoder, vae.decoder):
        torch.nn.init.normal_(part.conv_in.bias, std=0.6)
    vae.quant_conv.bias.data[vae.config.z_dim :] = -4.0  # log-variance


def _identity(weight: Tensor) -> None:
    """Make a convolution over time pass its newest frame through, twice where it doubles time."""
    weight.data.zero_()
    width = weight.shape[1]
    for part in range(weight.shape[0] // width):
        index = torch.arange(width)
        weight.data[part * width + index, index, -1, 0, 0] = 1.0


def encode(vae: AutoencoderKLWan, frames: Float[Tensor, "b 3 t h w"]) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the raw latents of a clip of 4k+1 frames."""
    part = vae.encoder
    x = part.conv_in(frames)
    for layer in part.down_blocks:
        x = layer(x)
        if hasattr(layer, "time_conv"):  # the first frame stays as it is
            x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2) if x.shape[2] > 1 else x
    x = part.conv_out(part.nonlinearity(part.norm_out(part.mid_block(x))))
    mean, logvar = vae.quant_conv(x).chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: Float[Tensor, "b c f h w"]) -> Tensor:
    """Frames of raw latents, not clamped."""
    part = vae.decoder
    x = part.mid_block(part.conv_in(vae.post_quant_conv(latents)))
    for block in part.up_blocks:
        for layer in block.resnets:
            x = layer(x)
        for layer in block.upsamplers or ():
            x = layer(_double_time(layer, x) if hasattr(layer, "time_conv") else x)
    frames: Tensor = part.conv_out(part.nonlinearity(part.norm_out(x)))
    return frames


def _double_time(layer: Any, x: Tensor) -> Tensor:
    """Make two frames of each but the first."""
    if x.shape[2] == 1:
        return x
    first, rest = x[:, :, :1], x[:, :, 1:]
    pairs = layer.time_conv(rest).unflatten(1, (2, -1))  # b 2 c t h w
    return torch.cat([first, pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)


def loss(
    vae: AutoencoderKLWan, frames: Float[Tensor, "b 3 t h w"], cover: Float[Tensor, "b 1 t h w"],
    noise: torch.Generator,
) -> Tensor:  # fmt: skip
    """L1 + MSE of the frames and of their differences in time, and a little KL.

    What is covered counts four times, what moves seven: else a limb is not worth drawing.
    """
    mean, logvar = encode(vae, frames)
    drawn = torch.randn(mean.shape, generator=noise).to(mean.device)
    error = decode(vae, mean + torch.exp(0.5 * logvar) * drawn).float() - frames
    weight = 1 + (FOREGROUND_WEIGHT - 1) * cover
    weight = weight / weight.mean()
    total = (weight * (error.abs() + error.square())).mean()
    if frames.shape[2] > 1:
        moving = 1 + (MOTION_WEIGHT - 1) * (cover.diff(dim=2).abs() > 0.1)
        change = error.diff(dim=2)
        total = total + (moving / moving.mean() * (change.abs() + change.square())).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return total + KL_WEIGHT * kl


def train(vae: AutoencoderKLWan, schedule: Schedule, checkpoint: Path, seed: int) -> None:
    """Train in place, on the device it is on; continue where the checkpoint says."""
    device = vae.device.type
    optimizers = _optimizers(vae, schedule)
    rates = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, schedule))
        for optimizer in optimizers
    ]
    parts: dict[str, Any] = {"vae": vae}
    parts |= {f"optimizer{index}": part for index, part in enumerate(optimizers)}
    parts |= {f"rate{index}": part for index, part in enumerate(rates)}
    start = resume(checkpoint, parts)
    if start >= schedule.steps:
        return
    pool = draw_pool(seed)
    with progress.bar(total=schedule.steps, description="vae", unit="step", done=start) as bar:
        for step, phase in enumerate(_steps(schedule)):
            if step < start:
                continue
            frames, cover = (part.to(device) for part in crops(pool, phase, seed, step))
            with torch.autocast(device, torch.bfloat16):  # two to five times faster than fp32
                value = loss(vae, frames, cover, torch.Generator().manual_seed(step))
            vae.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            _step(vae, optimizers)
            for rate in rates:
                rate.step()
            bar.update()
            if step % 50 == 0:
                logger.info("vae step %d loss %.4f", step, value.item())
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == schedule.steps:
                save(checkpoint, parts, step + 1)


def _optimizers(
    vae: AutoencoderKLWan, schedule: Schedule
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the convolutions, seen as matrices of (out, in x kernel); AdamW for the rest."""
    matrices = [torch.nn.Parameter(part.data.flatten(1)) for part in _convolutions(vae)]
    rest = [part for part in vae.parameters() if part.ndim < 4]
    return (
        torch.optim.Muon(matrices, lr=schedule.muon_rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=schedule.adamw_rate, betas=(0.9, 0.99), weight_decay=0.0),
    )


def _convolutions(vae: AutoencoderKLWan) -> list[Tensor]:
    return [part for part in vae.parameters() if part.ndim >= 4]


def _step(vae: AutoencoderKLWan, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
    """Step both; Muon's matrices share the convolutions' memory and are lent their gradients."""
    for matrix, part in zip(
        optimizers[0].param_groups[0]["params"], _convolutions(vae), strict=True
    ):
        assert matrix.data_ptr() == part.data_ptr()
        matrix.grad = None if part.grad is None else part.grad.flatten(1)
    for optimizer in optimizers:
        optimizer.step()


def _rate(step: int, schedule: Schedule) -> float:
    return min(1.0, (step + 1) / 50) * (0.02 + 0.98 * _cosine(step / schedule.steps))


def _cosine(share: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, share))


def _steps(schedule: Schedule) -> Iterator[Phase]:
    for phase in schedule.phases:
        for _ in range(phase.steps):
            yield phase


def draw_pool(seed: int) -> UInt8[np.ndarray, "n t h w"]:
    """Covers of every concept, held-out ones too: a VAE should know more than the DiT is told."""
    covers = [
        np.rint(255 * world.cover(concept, seed + index)).astype(np.uint8)
        for concept in world.CONCEPTS
        for index in range(POOL_PER_CONCEPT)
    ]
    return np.stack(covers)


def crops(
    pool: UInt8[np.ndarray, "n t h w"], phase: Phase, seed: int, step: int
) -> tuple[Float[Tensor, "b 3 t h w"], Float[Tensor, "b 1 t h w"]]:
    """Frames in [-1, 1] and cover of one step, cut around what moves, in any colours."""
    made = []
    for slot in range(phase.batch):
        draws = generator(seed, Stream.ORDER, step, slot)
        clip = pool[draws.integers(len(pool))]
        first = draws.integers(world.NUM_FRAMES - phase.num_frames + 1)
        clip = clip[first : first + phase.num_frames]
        spots = _spots(clip)
        middle = spots[draws.integers(len(spots))] + draws.integers(-8, 9, size=2)
        top, left = np.clip(middle - phase.size_px // 2, 0, world.SIZE_PX - phase.size_px)
        cut = clip[:, top : top + phase.size_px, left : left + phase.size_px] / np.float32(255)
        colours = list(world.COLOURS)[draws.integers(len(world.COLOURS))]
        background = list(world.BACKGROUNDS)[draws.integers(len(world.BACKGROUNDS))]
        made.append((cut, world.paint(cut, world.Scene("", colours, background, None))))
    cover = torch.from_numpy(np.stack([cut for cut, _ in made]))[:, None]
    frames = torch.from_numpy(np.stack([painted for _, painted in made])).movedim(-1, 1)
    return frames.float() / 127.5 - 1, cover


def _spots(clip: UInt8[np.ndarray, "t h w"]) -> Int[np.ndarray, "n 2"]:
    """Where something moves, or is, in a single frame: limbs are few pixels and the hard ones."""
    moved = clip.max(axis=0) - clip.min(axis=0)
    return np.argwhere((moved if len(clip) > 1 and moved.max() > 127 else clip[0]) > 127)
