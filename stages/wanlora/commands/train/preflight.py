"""Checks of `train` that need no torch: they refuse a mistake before seconds of imports.

Owns: the order of these checks. Must not import torch, diffusers or zarr.
"""

import os

from wanlora.adapters import targets
from wanlora.adapters.header import read_header
from wanlora.adapters.trained_on import check_kind
from wanlora.commands.train.base_model import find_base_here
from wanlora.commands.train.selection import Selection, encode_command, select_clips
from wanlora.config import TrainConfig
from wanlora.processes.ranks import rank_of
from wanlora.runs import claim, run_folder
from wanlora.store import index
from wanlora.store.views import read_view
from wanlora.training.cached_clips import check_encodings
from wanlora.wan.variants import Variant


def check(config: TrainConfig) -> Selection:
    """Refuse settings, a folder, a cache, a model or an adapter that cannot be used.

    A model on the hub is not downloaded here; it is checked after the download.

    Returns:
        The clips to train on.

    Raises:
        WanloraError: Names what cannot be used.
    """
    if rank_of(os.environ).world == 1:  # of several processes, the main one checks it for all
        # Settings are compared when the device is known, which decides `dtype`.
        claim.open_run(config.output_dir, {}, resume=config.resume, resolve=lambda _: {})
    index.open_store(config.cache)
    selection = select(config)
    continues = config.resume and run_folder.newest_checkpoint(config.output_dir) is not None
    first = None
    if config.init_adapter and not continues:  # a checkpoint has the weights; the file may be gone
        first = read_header(config.init_adapter)
    model = config.model or selection.view.model
    base = find_base_here(model, config.expert)
    if base and first:
        check_kind(first, base.variant, text=f"--init-adapter {first.path}", model=model)
    if base:
        config.check_model(base.variant)
        check_cached_for(config, base.variant, selection)
        linear_names = targets.linear_names(
            base.variant.shape.num_layers, reads_image=base.variant.shape.image_dim is not None
        )
        targets.match_targets(linear_names, config.lora.targets)
    return selection


def select(config: TrainConfig) -> Selection:
    """Read the view and select the training clips.

    Raises:
        StoreError: There is no such view or split, or clips of a manifest are missing.
        ManifestError: A manifest cannot be read.
        ConfigError: A clip weight is for an unknown activity or out of range.
    """
    return select_clips(
        read_view(config.cache, config.view),
        cache=config.cache,
        split=config.split,
        manifests=config.manifest,
        train_frames=config.train_frames,
        clip_weights=config.clip_weights,
    )


def check_cached_for(config: TrainConfig, variant: Variant, selection: Selection) -> None:
    """Check that a transformer can read the cached latents and embeddings.

    Raises:
        StaleStoreError: Names each difference, and the command that encodes the clips again.
    """
    view = selection.view
    command = encode_command(
        config.model or view.model, cache=config.cache, view=view.name, manifests=config.manifest
    )
    check_encodings(view, variant, encode_again=command)
