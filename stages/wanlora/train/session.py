"""Everything a run needs before its first step: refusals first, cheap ones before dear ones.

Owns: the order of checks and what is built from which setting. The loop itself is in `loop`.
Must not import the VAE, the text encoder, any pipeline or any video code.
"""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from wanlora import manifest, runs
from wanlora.config import TrainConfig
from wanlora.core import flow
from wanlora.core.buckets import Bucket
from wanlora.core.fingerprint import difference
from wanlora.core.order import Order, num_steps
from wanlora.core.rng import Stream, normal
from wanlora.errors import ConfigError, ModelError, StaleStoreError, StoreError
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip, read_view
from wanlora.train import checkpoints
from wanlora.train.batches import BatchSource, MicroBatch
from wanlora.train.masters import Masters
from wanlora.wan import adapter as lora
from wanlora.wan import device as devices
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import Variant, resolve, variant_of

BASE_CHECK_PAIRS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What the loop moves.

    `slots` are this rank's slots of a global batch, a tuple for each micro-batch; steps run from
    `first_step` up to, not including, `end_step`.
    """

    transformer: Any
    masters: Masters
    optimizer: torch.optim.Optimizer
    source: BatchSource
    ranks: PartialState
    device: torch.device
    dtype: torch.dtype
    global_batch: int
    slots: tuple[tuple[int, ...], ...]
    first_step: int
    end_step: int
    identity: dict[str, Any]
    shape: lora.LoraShape
    model: str


def open_session(config: TrainConfig) -> Session:
    """Check everything that can be checked, then load the transformer and the adapter.

    Raises:
        WanloraError: The run is impossible or pointless as asked for.
    """
    view = _select_clips(read_view(config.cache, config.view), config)
    model = config.model or view.model
    device = devices.pick(config.device, model)
    folder = resolve(model, ["transformer"])
    variant = variant_of(folder)
    _check_encodings(view, variant, config)
    reader = StoreReader.of_view(config.cache, view)
    ranks = PartialState(cpu=device.type == "cpu")
    global_batch = config.batch_size * config.gradient_accumulation_steps
    slots = _slots(config.batch_size, global_batch, ranks)
    source = _batch_source(config, view, variant, reader, global_batch)
    checkpoint = _open_run(config, ranks)

    device = ranks.device if ranks.num_processes > 1 else device
    dtype = _dtype(config.dtype, device)
    transformer = load_transformer(folder, dtype=dtype, device=device)
    shape = lora.LoraShape(
        rank=config.lora.rank,
        alpha=config.lora.alpha or config.lora.rank,
        targets=config.lora.targets,
        rslora=config.lora.rslora,
        dora=config.lora.dora,
    )
    adapter = lora.add_adapter(transformer, shape, seed=config.seed)
    masters = Masters(adapter)
    masters.load(lora.initial_values(adapter, config.seed))
    if config.gradient_checkpointing:
        # Nothing in a block draws random numbers, so their state need not be saved and restored.
        transformer.enable_gradient_checkpointing(
            partial(
                torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False
            )
        )
    if ranks.is_main_process:
        _say_what_is_resident(transformer, masters, dtype, device)
    optimizer = _optimizer(config, masters)
    identity = {
        "view_sha256": view.sha256,
        "latents": view.latents,
        "text": view.text,
        "variant": variant.name,
    }
    first_step = 0
    if checkpoint:
        first_step = checkpoints.load(
            checkpoint, identity=identity, masters=masters, optimizer=optimizer
        )
        logger.info("continuing from %s: step %d comes next", checkpoint, first_step)
    elif variant.max_base_loss is not None and not config.allow_untrained_base:
        _check_base(transformer, source, variant.max_base_loss, device, dtype)
    return Session(
        transformer=transformer,
        masters=masters,
        optimizer=optimizer,
        source=source,
        ranks=ranks,
        device=device,
        dtype=dtype,
        global_batch=global_batch,
        slots=slots,
        first_step=first_step,
        end_step=config.max_steps
        or num_steps(len(view.clips), batch_size=global_batch, num_epochs=config.num_epochs),
        identity=identity,
        shape=shape,
        model=model,
    )


def predict(
    transformer: Any, batch: MicroBatch, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the transformer on a micro-batch; return its prediction and the velocity target.

    Mixing and target are fp32; the transformer's inputs are cast to its type, the timestep stays
    float32. No autocast: it would demote the modules that diffusers keeps in fp32.
    """
    latents, noise, sigmas = (
        tensor.to(device, non_blocking=True)
        for tensor in (batch.latents, batch.noise, batch.sigmas)
    )
    prediction = transformer(
        hidden_states=flow.mix(latents, noise, sigmas).to(dtype),
        timestep=flow.timesteps(sigmas),
        encoder_hidden_states=batch.prompt_embeds.to(device, dtype, non_blocking=True),
        return_dict=False,
    )[0]
    return prediction, flow.velocity_target(latents, noise)


def _select_clips(view: View, config: TrainConfig) -> View:
    """Narrow a view to the split and manifests asked for."""
    wanted = (
        {clip.clip_id for clip in manifest.read_all(config.manifest)} if config.manifest else None
    )
    known = {clip.clip_id for clip in view.clips}
    if wanted is not None and (absent := sorted(wanted - known)):
        raise StoreError(
            f"{len(absent)} clips of the manifest are not in view {config.view!r} of "
            f"{config.cache}: {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}. Run: "
            f"wanlora cache-latents --cache {config.cache} "
            + " ".join(f"--manifest {path}" for path in config.manifest)
        )
    chosen = tuple(
        clip
        for clip in view.clips
        if clip.split == config.split and (wanted is None or clip.clip_id in wanted)
    )
    if not chosen:
        splits = sorted({clip.split for clip in view.clips})
        raise StoreError(
            f"view {config.view!r} of {config.cache} has no clips of split {config.split!r} to "
            f"train on; it has {len(view.clips)} clips, of splits: {', '.join(splits) or 'none'}"
        )
    return replace(view, clips=chosen)


def _by_bucket(view: View) -> dict[Bucket, list[ViewClip]]:
    buckets: dict[Bucket, list[ViewClip]] = {}
    for clip in view.clips:
        buckets.setdefault(clip.bucket, []).append(clip)
    return buckets


def _check_encodings(view: View, variant: Variant, config: TrainConfig) -> None:
    """Compare what the latents and embeddings were made with to what this transformer reads."""
    wanted: dict[str, dict[str, Any]] = {
        "latents": {
            "z_dim": variant.z_dim,
            "latents_mean": list(variant.latents_mean),
            "latents_std": list(variant.latents_std),
            "normalized": True,
        },
        "text": {
            "text_dim": variant.text_dim,
            "max_sequence_length": variant.max_sequence_length,
        },
    }
    recorded = {"latents": view.latents_provenance, "text": view.text_provenance}
    found = {
        kind: {name: recorded[kind].get(name) for name in fields} for kind, fields in wanted.items()
    }
    if differing := difference(found, wanted):
        raise StaleStoreError(
            f"view {config.view!r} of {config.cache} was encoded with {view.model}, which is not "
            f"what {variant.name} reads:\n  "
            + "\n  ".join(differing)
            + f"\nencode it again: wanlora cache-latents --cache {config.cache} --model "
            f"{config.model or view.model}"
        )


def _slots(batch_size: int, global_batch: int, ranks: PartialState) -> tuple[tuple[int, ...], ...]:
    """This rank's slice of the global batch, cut into micro-batches."""
    world = ranks.num_processes
    if global_batch % (world * batch_size):
        raise ConfigError(
            f"a global batch of {global_batch} clips (batch_size {batch_size} x "
            f"gradient_accumulation_steps {global_batch // batch_size}) cannot be shared by "
            f"{world} processes: make gradient_accumulation_steps a multiple of {world}"
        )
    share = global_batch // world
    first = ranks.process_index * share
    return tuple(
        tuple(range(start, start + batch_size)) for start in range(first, first + share, batch_size)
    )


def _batch_source(
    config: TrainConfig, view: View, variant: Variant, reader: StoreReader, global_batch: int
) -> BatchSource:
    clips = _by_bucket(view)
    sizes = {bucket: len(members) for bucket, members in clips.items()}
    return BatchSource(
        reader=reader,
        clips=clips,
        order=Order(sizes, batch_size=global_batch, seed=config.seed),
        seed=config.seed,
        sampler=config.flow.sampler,
        shift=config.flow.shift or view.shift,
        weighting=config.flow.weighting,
        caption_dropout=config.caption_dropout,
        empty_prompt=view.empty_prompt,
        sequence_length=variant.max_sequence_length,
    )


def _open_run(config: TrainConfig, ranks: PartialState) -> Path | None:
    """Let the main process make the folder; every rank then continues from the same checkpoint."""
    checkpoint = None
    if ranks.is_main_process:
        checkpoint = runs.open_run(
            config.output_dir, config.model_dump(mode="json"), resume=config.resume
        )
    ranks.wait_for_everyone()
    if ranks.is_main_process or not config.resume:
        return checkpoint
    return runs.newest_checkpoint(config.output_dir)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _optimizer(config: TrainConfig, masters: Masters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        # LambdaLR needs initial_lr to start anywhere but at step 0.
        [{"params": list(masters.parameters.values()), "initial_lr": config.learning_rate}],
        lr=config.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )


def _say_what_is_resident(
    transformer: Any, masters: Masters, dtype: torch.dtype, device: torch.device
) -> None:
    trainable = sum(master.numel() for master in masters.parameters.values())
    frozen = sum(p.numel() for p in transformer.parameters()) - trainable
    logger.info(
        "on %s: transformer %s parameters, frozen, %s; adapter %s trainable parameters (%.2f %%), "
        "fp32 masters; no VAE, no text encoder",
        device, _count(frozen), str(dtype).removeprefix("torch."), _count(trainable),
        100 * trainable / frozen,
    )  # fmt: skip


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


@torch.no_grad()
def _check_base(
    transformer: Any,
    source: BatchSource,
    max_base_loss: float,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Refuse a base that predicts no better than chance: wrong or half-loaded weights.

    Loss over target power on fixed (clip, sigma, noise) triples; 1 is what predicting zero gives.
    """
    members = [clip for bucket in sorted(source.clips) for clip in source.clips[bucket]]
    loss = power = 0.0
    for pair in range(BASE_CHECK_PAIRS):
        clip = members[pair % len(members)]
        latents = torch.from_numpy(source.reader.latents(clip.key)).float()[None]
        noise = torch.from_numpy(
            normal(source.seed, Stream.VALIDATION, 0, pair, tuple(latents.shape))
        )
        sigma = flow.sigma_of(
            (pair + 0.5) / BASE_CHECK_PAIRS, sampler=source.sampler, shift=source.shift
        )
        batch = MicroBatch(
            (clip.clip_id,), latents, noise, torch.tensor([sigma]), torch.ones(1),
            source.padded_prompt(clip.prompts[0])[None],
        )  # fmt: skip
        prediction, target = predict(transformer, batch, device, dtype)
        loss += float(flow.loss_per_clip(prediction, target).sum())
        power += float(target.square().mean())
    if not loss / power < max_base_loss:
        raise ModelError(
            f"the base model predicts no better than chance: its loss on {BASE_CHECK_PAIRS} fixed "
            f"pairs is {loss / power:.2f} of the target's power, expected under {max_base_loss}. "
            "Its weights are probably incomplete or of another model; to train it all the same: "
            "--set allow_untrained_base=true"
        )
