"""Generate frames from prompts, and images, with diffusers' own pipelines.

Owns: loading the pipeline in the right types, and one video's worth of settings. Never imported by
training. Legend: t frames, h w height and width.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import numpy as np
import peft
import torch
import transformers
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from jaxtyping import UInt8
from PIL import Image
from torch import nn

from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.core.text import shorten
from wanlora.cost.memory import Quantize, weight_bytes
from wanlora.errors import ModelError
from wanlora.wan.encoders import MAX_SEQUENCE_LENGTH, load_text_encoder, load_vae
from wanlora.wan.host_memory import HostBytes, loading_bytes, require_host_memory
from wanlora.wan.image_encoders import load_image_encoder
from wanlora.wan.placement import Offload
from wanlora.wan.streaming import has_streamed_blocks, stream_blocks
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import Expert, variant_of

Pipeline: TypeAlias = WanPipeline | WanImageToVideoPipeline
"""The pipeline of a text-to-video or of an image-to-video model."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VideoSettings:
    """Settings of one video, beside its prompt and seed.

    Attributes:
        num_frames: Frames, 4k+1.
        height: Height in px.
        width: Width in px.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 or less means none.
        negative_prompt: Content to avoid.
        guidance_scale_low: Guidance of the low-noise expert, in a model with two transformers.
            Without effect if `guidance_scale` is 1 or less: diffusers then has no guidance.
    """

    num_frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    negative_prompt: str
    guidance_scale_low: float | None = None


def load_pipeline(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offload: Offload = "none",
    quantize: Quantize = "none",
    num_streamed: int = 0,
) -> Pipeline:
    """Load every part of a pipeline with all its weights checked; `prepare` finishes it.

    The VAE and the image encoder are fp32; the transformers have `dtype`; the text encoder is bf16
    on an accelerator and fp32 on the CPU, so that there `from_pretrained(folder)` of the same
    class without further settings gives the same video, bit for bit.

    Args:
        folder: A complete model folder.
        dtype: Type of the transformers.
        device: Device that computes.
        offload: Other than `none`: the parts stay in main memory until `prepare`.
        quantize: Format of the weights in the transformers' blocks.
        num_streamed: Blocks of each transformer that are streamed; see `wan.streaming`.

    Raises:
        ModelError: A part cannot be loaded.
        DeviceError: This machine has too little memory.
    """
    text_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    home = device if offload == "none" else torch.device("cpu")
    types = {"vae": torch.float32, "text_encoder": text_dtype}
    variant = variant_of(folder)
    types |= {part.subfolder: dtype for part in variant.transformers}
    if variant.shape.image_dim:
        types["image_encoder"] = torch.float32
    if offload == "none":  # otherwise `select_placement` has checked it
        _require_memory(folder, types, device, quantize)
    parts: dict[str, Any] = {}
    for part in variant.transformers:
        parts[part.subfolder] = load_transformer(
            folder, dtype=dtype, device=device if num_streamed else home,
            subfolder=part.subfolder, quantize=quantize, num_streamed=num_streamed,
        )  # fmt: skip
        stream_blocks(parts[part.subfolder], num_streamed, device=device)
    vae: AutoencoderKLWan = load_vae(folder, dtype=torch.float32, device=home, tf32=True)
    encoder = load_text_encoder(folder, dtype=text_dtype, device=home)
    if "image_encoder" in types:
        image = load_image_encoder(folder, dtype=types["image_encoder"], device=home)
        parts |= {"image_encoder": image.model, "image_processor": image.processor}
    pipeline_class = WanImageToVideoPipeline if variant.is_i2v else WanPipeline
    try:
        pipeline: Pipeline = pipeline_class.from_pretrained(
            folder,
            **parts,
            vae=vae,
            text_encoder=encoder.model,
            tokenizer=encoder.tokenizer,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        name = pipeline_class.__name__
        raise ModelError(f"cannot load a {name} from {folder}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _require_memory(
    folder: Path, types: Mapping[str, torch.dtype], device: torch.device, quantize: Quantize
) -> None:
    """Refuse a model that this machine's memory cannot hold.

    Args:
        folder: A complete model folder.
        types: Type of each part in memory, by sub-folder.
        device: Device that the parts are loaded to.
        quantize: Format of the weights in the transformers' blocks.
    """
    needed, variant = HostBytes(), variant_of(folder)
    transformers = {part.subfolder for part in variant.transformers}
    for part, dtype in types.items():
        if quantize != "none" and device.type == "cpu" and part in transformers:
            needed += HostBytes(kept=int(weight_bytes(variant.shape, dtype.itemsize, quantize)))
        else:
            needed += loading_bytes(folder / part, dtype=dtype, device=device)
    require_host_memory(needed, "loading the model")


def prepare(
    pipeline: Pipeline,
    *,
    device: torch.device,
    shift: float,
    offload: Offload,
    vae_tiling: bool,
) -> None:
    """Finish a pipeline after its adapters are added.

    Args:
        pipeline: From `load_pipeline`, with the same `offload`.
        device: Device that computes.
        shift: The scheduler's flow_shift.
        offload: `model` keeps one part at a time on the device, `sequential` one layer.
        vae_tiling: Decode in overlapping tiles: less memory, other pixels at their seams.
    """
    config = pipeline.scheduler.config
    logger.info(
        "shift of sigma: %g (the model's scheduler/ has %g)", shift, config.get("flow_shift", 1.0)
    )
    pipeline.scheduler = type(pipeline.scheduler).from_config(config, flow_shift=shift)
    if vae_tiling:
        pipeline.vae.enable_tiling()
    if offload == "model" and has_streamed_blocks(pipeline.transformer):
        names = ("text_encoder", "image_encoder", "vae")
        others = [part for name in names if (part := getattr(pipeline, name, None))]
        take_turns_beside(transformers_of(pipeline).values(), others, device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)


def take_turns_beside(
    transformers: Iterable[nn.Module], parts: Iterable[nn.Module], device: torch.device
) -> None:
    """Keep one of the other parts at a time on a device, and none while a transformer runs.

    Streamed transformers must not be moved, as diffusers' own offloading does.

    Args:
        transformers: Transformers, which stay on the device.
        parts: Encoders and VAE, in main memory now.
        device: Device that computes.
    """
    hooks: list[Any] = []
    for part in parts:
        _, hook = cpu_offload_with_hook(part, device, hooks[-1] if hooks else None)
        hooks.append(hook)
    hooks[0].hook.prev_module_hook = hooks[-1]  # the VAE, after the video before

    def free_memory(*_: object) -> None:
        for hook in hooks:
            hook.offload()

    for transformer in transformers:
        transformer.register_forward_pre_hook(free_memory)


def transformers_of(pipeline: Pipeline) -> dict[Expert | None, Any]:
    """Transformers of a pipeline by their expert; the only transformer has the key None."""
    if pipeline.transformer_2 is None:
        return {None: pipeline.transformer}
    return {"high": pipeline.transformer, "low": pipeline.transformer_2}


@contextmanager
def base_alone(pipeline: Pipeline) -> Iterator[None]:
    """Disable the adapters inside the block; the output is then the base's, bit for bit."""
    adapted = [
        transformer
        for transformer in transformers_of(pipeline).values()
        if getattr(transformer, "peft_config", None)
    ]
    for transformer in adapted:
        transformer.disable_adapters()
    try:
        yield
    finally:
        for transformer in adapted:
            transformer.enable_adapters()


def generate(
    pipeline: Pipeline,
    prompt: str,
    settings: VideoSettings,
    *,
    seed: int,
    image: UInt8[np.ndarray, "h w 3"] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Make one video, equal to what diffusers' pipeline gives for this prompt and seed.

    The noise comes from `torch.Generator("cpu").manual_seed(seed)`: the same on every device.
    Frames are rounded to 8 bits as diffusers' image processor does.

    Args:
        pipeline: From `load_pipeline`.
        prompt: Prompt of the video.
        settings: Size, steps and guidance.
        seed: Seed of this video's noise.
        image: First frame, of the size of the video; for an image-to-video model.
        on_step: Called after each denoising step.
    """
    assert isinstance(pipeline, WanImageToVideoPipeline) == (image is not None)
    assert image is None or image.shape[:2] == (settings.height, settings.width)
    first = {} if image is None else {"image": Image.fromarray(image)}

    def after_step(_pipeline: object, _step: int, _t: object, values: dict[str, object]) -> object:
        on_step()
        return values

    frames: np.ndarray = pipeline(
        **first,
        prompt=prompt,
        negative_prompt=settings.negative_prompt,
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance_scale_2=settings.guidance_scale_low,
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        callback_on_step_end=after_step,
        output_type="np",
    ).frames[0]
    if not np.isfinite(frames).all():
        raise ModelError(
            f"the video for {shorten(prompt)} holds NaN: the model's or the adapter's weights are "
            "wrong, or --set dtype overflows (use bfloat16 or float32)"
        )
    pixels: np.ndarray = np.rint(frames * 255).astype(np.uint8)
    return pixels


def versions() -> dict[str, str]:
    """Versions of the libraries that a video's pixels depend on."""
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
