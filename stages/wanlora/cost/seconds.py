"""Seconds of a training step predicted from its FLOPs and bytes and a card's rates.

Owns: the prediction, and its floor. Both use published kernel rates (`cost.gpus`): they
are expectations, not measurements. A measurement on the card itself is better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from wanlora.core.buckets import Bucket, latent_shape
from wanlora.cost.flops import Parts, Recompute, StepFlops, step_flops
from wanlora.cost.gpus import Gpu
from wanlora.cost.memory import Workload, block_linear_bytes

# Traffic of everything but matrix products and attention, in passes over the T x W values of a
# block: counted on the real block at 32,760 tokens with Inductor's scheduler (compiled) and a
# dispatch mode (eager). FFN adapters add their own.
_PASSES: dict[bool, dict[Recompute, float]] = {
    True: {"none": 117.0, "selective": 139.0, "full": 152.0, "offload": 152.0},
    False: {"none": 368.0, "selective": 516.0, "full": 516.0, "offload": 516.0},
}
_FFN_PASSES = 32.0

VAE_FLOPS_PER_PIXEL = 163.7e12 / (81 * 480 * 832)
"""FLOPs of Wan's VAE encoder per pixel of a frame (counted on an 81x480x832 clip)."""
VAE_SHARE_OF_PEAK = 0.11
"""Share of the bf16 peak that the fp32 encoder with TF32 convolutions is assumed to reach: 1.5 s
for 81x480x832 on an H100, the middle of the predictions for it."""
H100_ENCODE_S = (0.6, 1.9)
"""Seconds of an 81x480x832 clip on an H100. Predicted, not measured: from bfloat16 at a high kernel
rate to float32 with TF32 at a low one."""
TEXT_FLOPS_PER_CLIP = 4.7e12
"""FLOPs of UMT5-XXL on 512 tokens."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Time of a step by kind of work.

    Attributes:
        attention: Self- and cross-attention, forward and backward.
        matmul: Linear layers, recomputation included.
        elementwise: Norms, activations, gates, sums of adapters: memory traffic.
    """

    attention: float
    matmul: float
    elementwise: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.attention + self.matmul + self.elementwise

    def times(self, factor: float) -> "Seconds":
        """Multiply every part by a factor."""
        return Seconds(factor * self.attention, factor * self.matmul, factor * self.elementwise)


def predict_seconds(work: Workload, modes: Sequence[Recompute], gpu: Gpu) -> Seconds:
    """Predict a micro-batch's forward and backward pass.

    The time of a part is its FLOPs divided by its kernels' rate, or its bytes divided by the memory
    rate; parts do not overlap.
    """
    step = _flops(work, modes)
    # Full and offloaded blocks compute attention forward a second time, at the forward rate.
    again = sum(mode in ("full", "offload") for mode in modes)
    forward = _attention(step.forward) * (1 + again / len(modes))
    backward = _attention(step.backward)
    linear = step.total - forward - backward
    ffn = _FFN_PASSES * any("ffn.net" in name for name in work.adapted)
    passes = sum(_PASSES[work.compiled][mode] + ffn for mode in modes)
    traffic = passes * work.num_tokens * work.shape.width * work.element_bytes
    clip = Seconds(
        attention=forward / (gpu.attention_forward * gpu.peak_flops)
        + backward / (gpu.attention_backward * gpu.peak_flops),
        matmul=linear / (gpu.matmul * gpu.peak_flops),
        elementwise=traffic / (gpu.stream * gpu.bandwidth),
    ).times(work.batch_size)
    recomputed = sum(mode != "none" for mode in modes) / len(modes)
    return replace(
        clip, elementwise=clip.elementwise + (2 + recomputed) * _dequantize_seconds(work, gpu)
    )


def predict_forward_seconds(work: Workload, gpu: Gpu) -> Seconds:
    """Predict the forward pass of one clip without gradients, as in validation."""
    forward = _flops(work, "none").forward
    attention = _attention(forward)
    # Full recomputation repeats the forward pass, so it costs that much more memory traffic.
    again = _PASSES[work.compiled]
    passes = (again["full"] - again["none"]) * work.shape.num_layers
    traffic = passes * work.num_tokens * work.shape.width * work.element_bytes
    return Seconds(
        attention=attention / (gpu.attention_forward * gpu.peak_flops),
        matmul=(forward.total - attention) / (gpu.matmul * gpu.peak_flops),
        elementwise=traffic / (gpu.stream * gpu.bandwidth) + _dequantize_seconds(work, gpu),
    )


def _dequantize_seconds(work: Workload, gpu: Gpu) -> float:
    """Seconds to read the 8-bit weights of all blocks and write them in the computing type."""
    if work.quantize == "none":
        return 0.0
    values = work.shape.num_layers * block_linear_bytes(work.shape, 1)
    traffic = values * (1 + work.element_bytes)
    return traffic / (gpu.stream * gpu.bandwidth)


def forward_flops(work: Workload) -> float:
    """FLOPs of the forward pass of one clip."""
    return _flops(work, "none").forward.total


def floor_seconds(work: Workload, gpu: Gpu) -> float:
    """Minimum time of a micro-batch with these kernels: no recomputation, only products."""
    nothing: Recompute = "none"
    seconds = predict_seconds(work, (nothing,) * work.shape.num_layers, gpu)
    return seconds.attention + seconds.matmul


def all_reduce_bytes(num_values: int, num_processes: int) -> int:
    """Bytes that each process sends to sum fp32 values around a ring: 2 (W - 1) / W x 4 N."""
    return 8 * num_values * (num_processes - 1) // num_processes


def encode_seconds(
    num_frames: int, height: int, width: int, gpu: Gpu, *, has_condition: bool = False
) -> float:
    """Predict stage one for a clip: the VAE's encoder, and UMT5 on its caption.

    With a condition, for image to video, the VAE encodes the clip's first frame and grey frames
    too. CLIP's 0.3 TFLOP for one frame are not counted.
    """
    pixels = (1 + has_condition) * num_frames * height * width
    vae = VAE_FLOPS_PER_PIXEL * pixels / VAE_SHARE_OF_PEAK
    return (vae + TEXT_FLOPS_PER_CLIP / gpu.matmul) / gpu.peak_flops


def h100_encode_seconds(clips: Mapping[Bucket, int]) -> tuple[float, float]:
    """Predict the range of stage one's seconds on an H100, in proportion to the latents' size.

    Args:
        clips: Number of clips, by bucket.
    """
    values = sum(number * prod(latent_shape(bucket)) for bucket, number in clips.items())
    share = values / prod(latent_shape(Bucket(81, 480, 832)))
    low, high = H100_ENCODE_S
    return low * share, high * share


def model_flops(work: Workload) -> float:
    """FLOPs of a micro-batch that the mathematics needs."""
    return work.batch_size * _flops(work, "none").model


def _flops(work: Workload, modes: Recompute | Sequence[Recompute]) -> StepFlops:
    return step_flops(
        work.shape, work.num_tokens, rank=work.rank, adapted=work.adapted, recompute=modes
    )


def _attention(parts: Parts) -> float:
    return parts.self_attention + parts.cross_attention
