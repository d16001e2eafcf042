"""Encode prompts to rows; each row is written as soon as it is encoded.

Owns: the loop over prompts. If anything ends the loop early, the encoded rows are published.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.encoder_memory import (
    explain_out_of_memory,
    free_memory,
    half_memory,
)
from wanlora.commands.cache_latents.find_encoders import Encoders
from wanlora.commands.cache_latents.segments import open_writer, prompt_shape
from wanlora.core.buckets import MAX_TOKENS
from wanlora.processes.turns import turn
from wanlora.progress import waiting
from wanlora.wan import encoders as wan_encoders
from wanlora.wan.host_memory import loading_bytes, require_host_memory

Progress = Callable[[int, str], None]
"""Called with the number of rows done, and a note about the speed."""


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Result of encoding prompts.

    Attributes:
        rows: Number of encoded prompts.
        truncated: Prompts that were cut because they have over 512 tokens.
    """

    rows: int = 0
    truncated: Sequence[str] = ()


def encode_prompts(
    settings: EncodeSettings,
    encoders: Encoders,
    chunks: Iterable[Mapping[str, str]],
    progress: Progress,
    *,
    committed: Callable[[], Container[str]] = frozenset,
) -> EncodedPrompts:
    """Load UMT5, encode prompts, write them, and free it; without any prompt it is not loaded.

    Args:
        settings: The cache, and the types.
        encoders: The model's folder and the device.
        chunks: Prompts by key; each chunk is committed before the next one is read.
        progress: Called for every prompt.
        committed: Returns the rows that others have made; called before each chunk.

    Raises:
        DeviceError: Out of memory; names what to change.
    """
    chunks = iter(chunks)
    if (first := next(chunks, None)) is None:
        return EncodedPrompts()
    umt5 = _load_text_encoder(settings, encoders)
    rows, truncated = 0, []
    for prompts in chain([first], chunks):
        there = committed()
        with open_writer(settings, encoders, "text", prompt_shape(encoders)) as writer:
            for key, prompt in prompts.items():
                if key not in there:
                    if wan_encoders.num_prompt_tokens(umt5.tokenizer, prompt) > MAX_TOKENS:
                        truncated.append(prompt)
                    advice = "stop other programs that use the device"
                    with explain_out_of_memory("encoding a prompt", advice):
                        (embeds,) = wan_encoders.encode_prompts(umt5, [prompt])
                    writer.add(key, embeds.float().numpy(), source=prompt)
                    rows += 1
                progress(1, "")
    del umt5
    free_memory()
    return EncodedPrompts(rows, truncated)


def _load_text_encoder(settings: EncodeSettings, encoders: Encoders) -> wan_encoders.TextEncoder:
    """Load UMT5, one process of this machine at a time."""
    dtype, what = getattr(torch, settings.text_dtype), "loading the text encoder"
    smaller = half_memory("text_dtype", settings.text_dtype)
    explained = explain_out_of_memory(
        what, "free the device (UMT5-XXL takes 11.4 GB in bfloat16)", *smaller,
        "choose another device with --device",
    )  # fmt: skip
    folder, device = encoders.folder, encoders.device
    with waiting(what), turn("load"), explained:
        needed = loading_bytes(folder / "text_encoder", dtype=dtype, device=device)
        require_host_memory(needed, what, *smaller)
        loaded = wan_encoders.load_text_encoder(folder, dtype=dtype, device=device)
    encoders.require_unchanged("text_encoder")
    encoders.require_unchanged("tokenizer")
    return loaded
