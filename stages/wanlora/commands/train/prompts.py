"""Prompts of previews: the user's own, else the view's, with their embeddings.

Owns: which prompts a run shows, and the child process that encodes those that are not cached. The
text encoder is loaded in that process alone; its memory is free again before the transformer is
loaded. Must not import: the text encoder.
"""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from wanlora.commands.train.data import Data, require_finite
from wanlora.config import TrainConfig
from wanlora.core.location import prompt_home
from wanlora.core.prompts import prompt_key
from wanlora.errors import ModelError
from wanlora.processes.ranks import SRUN, TORCHRUN
from wanlora.processes.signals import interrupted_by_signals
from wanlora.store import index
from wanlora.store.row_reader import RowReader
from wanlora.wan.model_folder import TEXT_ENCODER, find_downloaded

LAUNCHER = (*TORCHRUN, *SRUN)
"""Variables that would make the child process one of several."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreviewPrompt:
    """A prompt of previews.

    Attributes:
        text: The prompt.
        embeds: Its embedding, zero past its length.
    """

    text: str
    embeds: Float[torch.Tensor, "l d"]


def preview_prompts(config: TrainConfig, data: Data, device: torch.device) -> list[PreviewPrompt]:
    """Read the embeddings of the run's prompts; encode own ones that are not cached.

    Without own prompts they are the view's validation prompts, else captions of held-out clips.

    Args:
        config: The run's settings.
        data: Its view and store.
        device: Where the child process may compute.

    Raises:
        ModelError: The child process failed; has its whole message and the command to run.
        StoreError: A row is missing or damaged.
        NonFiniteError: A row holds NaN or infinity.
    """
    if config.previews.prompts:
        texts = {prompt_key(text): text for text in config.previews.prompts}
        if missing := _missing(data, texts):
            encode(config, missing, device, view_model=data.view.model)
        rows = _read(config, data, texts)
    else:
        texts = _of_the_view(config, data)
        rows = {key: data.source.reader.prompt_embeds(key) for key in texts}
    negative = data.source.reader.prompt_embeds(data.view.negative_prompt)
    for key, text in [*texts.items(), ("", "the negative prompt")]:
        name = f"preview prompt {text!r}" if key else text
        require_finite(config, name, torch.from_numpy(rows.get(key, negative)))
    return [PreviewPrompt(text, data.source.padded(rows[key])) for key, text in texts.items()]


def _of_the_view(config: TrainConfig, data: Data) -> dict[str, str]:
    """Validation prompts of the view, else captions of held-out clips: texts by key."""
    view, num = data.view, config.previews.num_prompts
    if named := {prompt.key: prompt.prompt for prompt in view.validation_prompts[:num]}:
        return named
    held_out = [clip for clip in view.clips if clip.split == config.validation.split]
    keys = dict.fromkeys(clip.prompts[0] for clip in held_out or data.clips)
    return data.source.reader.prompts(list(keys)[:num])


def _missing(data: Data, texts: Mapping[str, str]) -> list[str]:
    """Prompts that neither the cache nor the user's cache folder has."""
    _, left = data.source.reader.missing([], texts)
    left = index.missing_keys(prompt_home(), "text", data.view.text, left)
    return [texts[key] for key in left]


def _read(
    config: TrainConfig, data: Data, keys: Collection[str]
) -> dict[str, Float[np.ndarray, "l d"]]:
    """Read rows from the cache, also those that the child process added, or the user's folder."""
    found: dict[str, Float[np.ndarray, "l d"]] = {}
    for place in (config.cache, prompt_home()):
        rows = index.committed(place, "text", data.view.text)
        reader = RowReader.of_generation(place, "text", data.view.text, rows)
        left = [key for key in keys if key not in found]
        found |= {key: reader.read(key) for key in rows.present(left)}
    assert found.keys() == set(keys)
    return found


def encode(
    config: TrainConfig, texts: Sequence[str], device: torch.device, *, view_model: str
) -> None:
    """Encode prompts into the cache, or the user's cache folder, in a child process.

    The child process does not download a text encoder: 11 GB are not a side effect.

    Args:
        config: Its cache and view.
        texts: Prompts.
        device: Where to compute.
        view_model: The view's model. Its text encoder is used if it is on this machine, else that
            of the run's model.

    Raises:
        ModelError: The child process failed; has its whole message and the command to run.
        KeyboardInterrupt: A signal ended this process and the child process.
    """
    words = ["cache-latents", "--cache", str(config.cache), "--view", config.view]
    if config.model and not _has_text_encoder(view_model) and _has_text_encoder(config.model):
        words += ["--model", config.model]
    prompts = [f"--preview-prompt={text}" for text in texts]
    logger.info("encoding %d preview prompt(s), in a process of its own", len(texts))
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    child = subprocess.Popen(  # noqa: S603  (our own command)
        [sys.executable, "-m", "wanlora", *words, *prompts, "--device", str(device)],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    with interrupted_by_signals(), child:
        try:
            error = _log_notes(child)
        except KeyboardInterrupt:  # a scheduler may signal only this process
            child.terminate()
            child.wait()
            raise
    if child.returncode:
        said = "\n".join(error) or f"its exit code is {child.returncode}"
        raise ModelError(
            f"the prompts of --preview-prompt were not encoded:\n{said}\n"
            "Encode them with the next command, here (it may download the text encoder) or on a "
            "machine that has the text encoder and this cache; or leave out --preview-prompt:\n"
            + shlex.join(["wanlora", *words, *prompts])
        )


def _has_text_encoder(model: str | None) -> bool:
    """Whether a model's text encoder is on this machine."""
    with suppress(ModelError):
        return model is not None and find_downloaded(model, TEXT_ENCODER) is not None
    return False


def _log_notes(child: "subprocess.Popen[str]") -> list[str]:
    """Log what a child process prints, until it ends, and return the lines of its error."""
    assert child.stderr
    error: list[str] = []
    for line in map(str.rstrip, child.stderr):
        if error or line.startswith(("error:", "Traceback")):
            error.append(line)
        elif line:
            logger.info("%s", line)
    return error
