"""`inspect --decode`: latents of a cache decoded by the VAE, beside the frames of their source.

Owns: finding the clip, its source and its VAE again. The only part of `inspect` that loads a model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.core.text import file_stem
from wanlora.data.clip import Clip
from wanlora.errors import MediaError, StoreError
from wanlora.files import free_path
from wanlora.media import mp4
from wanlora.media.quality import psnr
from wanlora.progress import waiting
from wanlora.store.row_reader import RowReader
from wanlora.store.views import View, ViewClip

Readers = Mapping[tuple[Kind, str], RowReader]


def decode_clips(
    names: Sequence[str],
    views: Sequence[View],
    readers: Readers,
    *,
    cache: Location,
    device: str,
    output_dir: Path,
) -> list[dict[str, Any]]:
    """Decode clips to videos with the source on the left and the decoded latents on the right.

    Args:
        names: Clip ids, or starts of keys.
        views: Views to search for the clips.
        readers: Readers of the rows, by kind and fingerprint.
        cache: Cache folder or URL, for messages.
        device: Name of the device.
        output_dir: Folder of the videos.

    Returns:
        A dict per clip: clip_id, key, video, psnr_db (None when the source is gone).

    Raises:
        StoreError: No view names such a clip, or its row cannot be used.
        ModelError: The view's model cannot be loaded.
    """
    found = [_find(name, views, cache) for name in names]
    return [_decode(view, clip, readers, device, output_dir) for view, clip in found]


def _find(name: str, views: Sequence[View], cache: Location) -> tuple[View, ViewClip]:
    found = [
        (view, clip)
        for view in views
        for clip in view.clips
        if clip.clip_id == name or (len(name) >= 6 and clip.key.startswith(name))
    ]
    if not found:
        some = ", ".join(clip.clip_id for view in views[:1] for clip in view.clips[:3])
        raise StoreError(
            f"no view of {cache} names a clip {name}; expected a clip id, or 6 digits of a "
            f"key or more (there are: {some or 'none'}, ...)"
        )
    if len({clip.key for _, clip in found}) > 1:
        names = ", ".join(clip.clip_id for _, clip in found[:4])
        raise StoreError(f"{name} could be {names}; give more digits")
    return found[0]


def _decode(
    view: View, clip: ViewClip, readers: Readers, device_name: str, output_dir: Path
) -> dict[str, Any]:
    import torch  # noqa: PLC0415  (seconds to import, and nothing else here needs it)

    from wanlora.wan import device, encoders, model_folder  # noqa: PLC0415

    reader = readers["latents", view.fingerprint("latents")]
    latents = torch.from_numpy(reader.read(clip.key).astype(np.float32))[None]
    place = device.select_device(device_name, view.model)
    folder = model_folder.resolve(view.model, ["vae"])
    dtype = getattr(torch, view.provenance("latents")["compute_dtype"])
    with waiting(f"decoding {clip.clip_id} on {place}"):
        vae = encoders.load_vae(folder, dtype=dtype, device=place, tf32=False)
        decoded = encoders.decode_latents(vae, latents)[0].cpu().numpy()
    record = reader.source(reader.rows[clip.key])
    source = _source(record)
    quality = None
    if source is not None and source.shape == decoded.shape:
        quality = psnr(source, decoded)
        decoded = np.concatenate([source, decoded], axis=2)
    path = free_path(output_dir / f"{file_stem(clip.clip_id)}.mp4")
    fps = float(record.get("fps", clip.fps)) if isinstance(record, dict) else clip.fps
    shown = "" if quality is None else f", {quality:.2f} dB"
    mp4.write(path, decoded, fps=fps, metadata={"title": clip.clip_id, "comment": clip.key + shown})
    return {
        "clip_id": clip.clip_id,
        "key": clip.key,
        "video": str(path),
        "psnr_db": None if quality is None else round(quality, 2),
    }


def _source(record: Any) -> "np.ndarray[Any, np.dtype[np.uint8]] | None":
    """Frames of the source as the VAE received them, from its commit record."""
    if not isinstance(record, dict) or not Path(str(record.get("path", ""))).is_file():
        return None
    frames, height, width = record["bucket"]
    clip = Clip(
        clip_id=record["clip_id"], source=record["path"], source_sha256=None, source_group="",
        kind=record.get("kind", "video"), start_s=record["start_s"], fps=record["fps"],
        num_frames=frames, height=height, width=width, prompts=("",), activity="", split="",
        orig={}, transform=dict(record.get("transform", {})), warnings=(),
        path=Path(record["path"]),
    )  # fmt: skip
    from wanlora.data.clip_frames import load_clip  # noqa: PLC0415  (imports torch)

    try:
        return load_clip(clip).permute(0, 2, 3, 1).numpy()
    except MediaError:
        return None
