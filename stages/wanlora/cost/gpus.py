"""GPUs by name: peak, memory and bandwidth from data sheets, and the shares that kernels reach.

Owns: the data of a card before anything runs on it. Figures are the vendors' and the kernel
authors', not measurements of this project.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """Rates of a card.

    Attributes:
        peak_flops: Dense bf16 with fp32 accumulation, FLOP/s; headline figures are often twice this
            (2:4 sparsity).
        memory_bytes: Memory as the driver reports it, a little less than in the card's name.
        bandwidth: Memory bandwidth, bytes/s.
        matmul: Share of the peak that large bf16 matrix products reach.
        attention_forward: Share that fused attention (head width 128, 16k tokens) reaches forward.
        attention_backward: The same, backward.
        stream: Share of the bandwidth that elementwise kernels reach.
    """

    peak_flops: float
    memory_bytes: float
    bandwidth: float
    matmul: float = 0.75
    attention_forward: float = 0.60
    attention_backward: float = 0.50
    stream: float = 0.78


def _hopper(peak: float, memory_gb: float, bandwidth_tb: float) -> Gpu:
    # cuDNN's rates in the FlashAttention-3 paper (arXiv 2407.08608, figures 5 and 6): 595 and 516
    # TFLOP/s at 16k tokens; 790 TFLOP/s of cuBLAS, both of a peak of 989.4.
    return Gpu(peak * 1e12, memory_gb * 1e9, bandwidth_tb * 1e12, 0.80, 0.60, 0.52)


def _other(peak: float, memory_gb: float, bandwidth_tb: float) -> Gpu:
    # FlashAttention-2 on an A100 (arXiv 2307.08691, figures 5 and 6): about 0.6 of the peak; the
    # other cards are assumed to be like it.
    return Gpu(peak * 1e12, memory_gb * 1e9, bandwidth_tb * 1e12)


# From NVIDIA's data sheets of each card (B200, H200, H100, A100, A10, L40S, L40, L4, RTX A6000,
# RTX 6000 Ada), its Ampere, Ada and Blackwell white papers (GeForce), and AMD's data sheets
# (MI250X: both dies; MI300X). Memory: 1 GiB is 1.0737 GB, less about 1 % that the driver keeps.
GPUS: dict[str, Gpu] = {
    "B200": _hopper(2250, 191, 8.0),
    "H200": _hopper(989.4, 150, 4.8),
    "H200 NVL": _hopper(835.5, 150, 4.8),
    "GH200": _hopper(989.4, 102, 4.0),
    "H100": _hopper(989.4, 85, 3.35),
    "H100 NVL": _hopper(835.5, 100, 3.9),
    "H100 PCIe": _hopper(756.5, 85, 2.04),
    "A100": _other(312, 85, 2.04),
    "A100 40GB": _other(312, 42.4, 1.555),
    "A10": _other(125, 23.8, 0.6),
    "L40S": _other(362.05, 47.7, 0.864),
    "L40": _other(181.05, 47.7, 0.864),
    "L4": _other(121, 23.8, 0.3),
    "RTX A6000": _other(154.8, 51, 0.768),
    "RTX 6000 Ada": _other(364.25, 51, 0.96),
    "RTX 5090": _other(209.5, 34, 1.792),
    "RTX 4090": _other(165.2, 25.4, 1.008),
    "RTX 4080": _other(97.5, 17.0, 0.717),
    "RTX 3090": _other(71, 25.4, 0.936),
    "MI250X": _other(383, 137, 3.2),
    "MI300X": _other(1307.4, 206, 5.3),
}

# Sizes of memory from NVIDIA's and AMD's product pages, in GiB, for cards whose peak with fp32
# accumulation is not in the sheets above: their memory is counted, their time is not predicted.
MEMORY_GIB: dict[str, int] = {
    "RTX 5080": 16, "RTX 5070 Ti": 16, "RTX 5070": 12, "RTX 5060 Ti 16GB": 16, "RTX 5060 Ti": 8,
    "RTX 5060": 8, "RTX 4090 D": 24, "RTX 4080 SUPER": 16, "RTX 4070 Ti SUPER": 16,
    "RTX 4070 Ti": 12, "RTX 4070 SUPER": 12, "RTX 4070": 12, "RTX 4060 Ti 16GB": 16,
    "RTX 4060 Ti": 8, "RTX 4060": 8, "RTX 3090 Ti": 24, "RTX 3080 Ti": 12, "RTX 3080 12GB": 12,
    "RTX 3080": 10, "RTX 3070 Ti": 8, "RTX 3070": 8, "RTX 3060 Ti": 8, "RTX 3060": 12,
    "RTX PRO 6000": 96, "RTX 5000 Ada": 32, "RTX 4500 Ada": 24, "RTX 4000 Ada": 20,
    "RTX A5500": 24, "RTX A5000": 24, "RTX A4500": 20, "RTX A4000": 16, "A40": 48, "A30": 24,
    "A10G": 24, "L20": 48, "A800": 80, "H800": 80, "H20": 96, "MI210": 64, "MI325X": 256,
}  # fmt: skip


SIZE_TOLERANCE = 0.12
"""Tolerance of the GB in a name: GB or GiB (7 %), and memory that the driver or ECC reserves."""


def gpu_of(device_name: str) -> Gpu | None:
    """Find a card by the longest name that fits; None when not known.

    The names of a GPU's slice (MIG), a laptop's GPU and a reduced card contain a faster one's name.

    Args:
        device_name: Name from `torch.cuda.get_device_name`, for example `NVIDIA H100 80GB HBM3`.
    """
    if re.search(r"\b(MIG|Laptop|Max-Q|Mobile)\b", device_name):
        return None
    return next((GPUS[name] for name in _by_length() if _is_named(name, device_name)), None)


def gpu_named(name: str) -> str | None:
    """Find a card's name in the tables from a name that people write.

    Args:
        name: For example `4090`, `rtx-4090`, `H100 SXM` or `a100 80gb`.
    """
    keys = {_squeezed(key): key for key in (*GPUS, *MEMORY_GIB)}
    sizeless = re.sub(r"(?<![0-9a-z])\d+ ?gb\b", "", name.lower())
    wanted = []
    for text in map(_squeezed, (name, sizeless)):
        bare = re.sub(r"sxm\d?|hbm\d?e?|generation|edition|gpu", "", text)
        wanted += [text, bare, bare.replace("pcie", "")]
    return next(
        (keys[text] for each in wanted for text in (each, f"rtx{each}") if text in keys), None
    )


def memory_of(key: str) -> float:
    """Return the bytes of a card's memory, less about 1 % that the driver keeps.

    Args:
        key: A name of either table.
    """
    return GPUS[key].memory_bytes if key in GPUS else 0.99 * 2**30 * MEMORY_GIB[key]


def other_size(name: str, memory_bytes: float) -> int | None:
    """Return the GB that a name has, if the card's memory is not about that; None otherwise.

    Args:
        name: As people write it, for example `RTX 3060 8GB`.
        memory_bytes: Memory of the card that was found under this name.
    """
    found = re.search(r"(?<![0-9a-z])(\d+) ?gb\b", name.lower())
    same = found is None or abs(int(found[1]) * 2**30 / memory_bytes - 1) < SIZE_TOLERANCE
    return None if found is None or same else int(found[1])


def mfu(flops: float, seconds: float, device_name: str) -> float | None:
    """Model FLOPs utilisation: flops / seconds / peak, in [0, 1]; None when no peak is known.

    Args:
        flops: `StepFlops.model` of the clips that this device had in the step.
        seconds: The step's time.
        device_name: See `gpu_of`.
    """
    gpu = gpu_of(device_name)
    return None if gpu is None or seconds <= 0 else flops / seconds / gpu.peak_flops


def _by_length() -> Iterator[str]:
    return iter(sorted(GPUS, key=len, reverse=True))


def _is_named(name: str, device_name: str) -> bool:
    pattern = rf"\b{re.escape(name)}\b(?! (D|Ti|SUPER)\b)"
    if name == "A100 40GB":  # sold as A100-SXM4-40GB and A100-PCIE-40GB
        pattern = r"\bA100\b.*\b40GB\b"
    return re.search(pattern, device_name) is not None


def _squeezed(name: str) -> str:
    return re.sub(r"^(nvidia|geforce|amd)+", "", re.sub(r"[^a-z0-9]", "", name.lower()))
