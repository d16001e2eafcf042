"""Count or estimate the tokens of captions, without a download.

Owns: finding a tokenizer on this machine, and the estimate without one. transformers and
torch are imported only when there is a tokenizer to load.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from wanlora.wan.model_folder import MICRO, resolve

TOKENS_PER_WORD = 1.3
TOKENS_PER_CHARACTER = 0.7
"""Rules of thumb for UMT5's vocabulary: words of alphabets, and characters of scripts without
spaces."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of each caption, `</s>` included.

    Attributes:
        counts: By caption.
        tokenizer: Folder of the tokenizer that counted; None when the counts are estimates.
    """

    counts: dict[str, int]
    tokenizer: str | None


def count_tokens(model: str, captions: Iterable[str]) -> TokenCounts:
    """Count with the model's tokenizer if it is on this machine, else estimate.

    Args:
        model: `micro`, a local diffusers folder, or a hub id; never downloaded.
        captions: Texts.
    """
    texts = dict.fromkeys(captions)
    folder = local_folder(model)
    if folder is None:
        return TokenCounts({text: estimate(text) for text in texts}, None)
    from wanlora.wan.encoders import load_tokenizer, num_prompt_tokens  # noqa: PLC0415  heavy

    tokenizer = load_tokenizer(folder)
    counts = {text: num_prompt_tokens(tokenizer, text) for text in texts}
    return TokenCounts(counts, str(folder / "tokenizer"))


def estimate(text: str) -> int:
    """Estimated tokens: 1.3 per word, 0.7 per character of scripts without spaces, and `</s>`."""
    dense = len(re.findall(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", text))
    words = len(re.findall(r"[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+", text))
    return round(words * TOKENS_PER_WORD + dense * TOKENS_PER_CHARACTER) + 1


def local_folder(model: str) -> Path | None:
    """Folder of a model whose tokenizer is on this machine; None when it would be a download."""
    if model == MICRO:
        return resolve(model, ("tokenizer",))
    folder = Path(model).expanduser()
    if (folder / "tokenizer").is_dir():
        return folder
    try:
        cached = huggingface_hub.try_to_load_from_cache(model, "tokenizer/tokenizer.json")
    except huggingface_hub.errors.HFValidationError:
        return None
    return Path(cached).parent.parent if isinstance(cached, str) else None
