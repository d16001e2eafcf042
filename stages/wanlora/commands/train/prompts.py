"""Prompts of previews, given or from the view, with their embeddings and first frames.

Owns: the choice of prompts and of the clips whose first frames are used, and the child process that
encodes prompts that are not cached. Only that process loads the text encoder, so its memory is free
again before the transformer is loaded. Must not import: the text encoder.
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
from wanlora.core.buckets import Bucket, usual
from wanlora.core.location import Location, prompt_home
from wanlora.core.prompts import prompt_key
from wanlora.errors import ModelError
from wanlora.processes.ranks import SRUN, TORCHRUN
from wanlora.processes.signals import interrupted_by_signals
from wanlora.store import index
from wanlora.store.row_reader import RowReader
from wanlora.store.views import ViewClip
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
        start: Clip whose first frame the preview starts from; None for text to video.
    """

    text: str
    embeds: Float[torch.Tensor, "l d"]
    start: ViewClip | None = None


def preview_prompts(
    data: Data,
    texts: Sequence[str],
    *,
    num_prompts: int,
    model: str | None,
    device: torch.device,
) -> list[PreviewPrompt]:
    """Read what the run's previews are made from; encode given prompts that are not cached.

    Args:
        data: The run's view and store.
        texts: Given prompts; if empty, the view's validation prompts are used, or else captions of
            held-out clips.
        num_prompts: Number of prompts without given ones.
        model: Model of the run as given; None = the view's.
        device: Device of the child process that encodes.

    Raises:
        ModelError: The child process failed; has its whole message and the command to run.
        StoreError: A row is missing or damaged.
        NonFiniteError: A row contains NaN or infinity.
    """
    if texts:
        by_key = {prompt_key(text): text for text in texts}
        if missing := _missing(data, by_key):
            encode(
                data.cache, data.view.name, missing, device, model=model,
                view_model=data.view.model,
            )  # fmt: skip
        rows = _read(data, by_key)
    else:
        by_key = _prompts_of_view(data, num_prompts)
        rows = {key: data.source.reader.prompt_embeds(key) for key in by_key}
    negative = data.source.reader.prompt_embeds(data.view.negative_prompt)
    for key, text in [*by_key.items(), ("", "the negative prompt")]:
        name = f"preview prompt {text!r}" if key else text
        require_finite(data.cache, name, torch.from_numpy(rows.get(key, negative)))
    starts = _starts(data, list(by_key)) if "cond_latents" in data.source.kinds else {}
    return [
        PreviewPrompt(text, data.source.padded(rows[key]), starts.get(key))
        for key, text in by_key.items()
    ]


def _starts(data: Data, keys: Sequence[str]) -> dict[str, ViewClip]:
    """Select the clip whose first frame each prompt starts from, by the prompt's key.

    A clip with this caption, otherwise a held-out clip of the previews' size; a training clip only
    if no held-out clip has this size.
    """
    bucket = preview_bucket(data)
    held_out, trained = (
        [clip for clip in clips if clip.bucket == bucket] for clips in (data.held_out, data.clips)
    )
    others = held_out or trained
    starts = {}
    for number, key in enumerate(keys):
        own = (clip for clip in [*held_out, *trained] if key in clip.prompts)
        clip = starts[key] = next(own, others[number % len(others)])
        logger.info("preview %d starts from the first frame of %s clip %s", number, clip.split,
                    clip.clip_id)  # fmt: skip
        for field, rows in data.source.conditions([clip]).items():
            require_finite(data.cache, f"the {field.replace('_', ' ')} of {clip.clip_id}", rows)
    return starts


def preview_bucket(data: Data) -> Bucket:
    """Size of the previews: that of most training clips."""
    return usual(clip.bucket for clip in data.clips)


def _prompts_of_view(data: Data, num: int) -> dict[str, str]:
    """Validation prompts of the view, else captions of held-out clips: texts by key."""
    if prompts := {prompt.key: prompt.prompt for prompt in data.view.validation_prompts[:num]}:
        return prompts
    keys = dict.fromkeys(clip.prompts[0] for clip in data.held_out or data.clips)
    return data.source.reader.prompts(list(keys)[:num])


def _missing(data: Data, texts: Mapping[str, str]) -> list[str]:
    """Prompts that neither the cache nor the user's cache folder has."""
    left = data.source.reader.missing("text", texts)
    left = index.missing_keys(prompt_home(), "text", data.view.fingerprint("text"), left)
    return [texts[key] for key in left]


def _read(data: Data, keys: Collection[str]) -> dict[str, Float[np.ndarray, "l d"]]:
    """Read rows from the cache, with those that the child process added, or the user's folder."""
    embeds: dict[str, Float[np.ndarray, "l d"]] = {}
    for place in (data.cache, prompt_home()):
        rows = index.committed(place, "text", data.view.fingerprint("text"))
        reader = RowReader.of_generation(place, "text", data.view.fingerprint("text"), rows)
        left = [key for key in keys if key not in embeds]
        embeds |= {key: reader.read(key) for key in rows.present(left)}
    assert embeds.keys() == set(keys)
    return embeds


def encode(
    cache: Location,
    view: str,
    texts: Sequence[str],
    device: torch.device,
    *,
    model: str | None,
    view_model: str,
) -> None:
    """Encode prompts into the cache, or the user's cache folder, in a child process.

    The child process does not download a text encoder (11 GB).

    Args:
        cache: Cache of the view.
        view: Name of the view.
        texts: Prompts.
        device: Device to compute on.
        model: Model of the run as given. Its text encoder is used if that of `view_model` is not on
            this machine.
        view_model: Model of the view.

    Raises:
        ModelError: The child process failed; has its whole message and the command to run.
        KeyboardInterrupt: A signal ended this process and the child process.
    """
    words = ["cache-latents", "--cache", str(cache), "--view", view]
    if model and not _has_text_encoder(view_model) and _has_text_encoder(model):
        words += ["--model", model]
    prompts = [f"--preview-prompt={text}" for text in texts]
    logger.info("encoding %d preview prompt(s) in a separate process", len(texts))
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
        message = "\n".join(error) or f"its exit code is {child.returncode}"
        raise ModelError(
            f"the prompts of --preview-prompt were not encoded:\n{message}\n"
            "Encode them with the next command, here (it may download the text encoder) or on a "
            "machine that has the text encoder and this cache; or leave out --preview-prompt:\n"
            + shlex.join(["wanlora", *words, *prompts])
        )


def _has_text_encoder(model: str | None) -> bool:
    """Return whether a model's text encoder is on this machine."""
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
