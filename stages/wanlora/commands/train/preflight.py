"""Checks of `train` that need no torch: a mistake is refused before seconds of imports.

Owns: the order of these checks. Must not import torch, diffusers or zarr.
"""

import os

from wanlora.adapters import targets
from wanlora.adapters.header import read_header
from wanlora.commands.train.selection import choose, encode_again
from wanlora.config import TrainConfig
from wanlora.processes.ranks import rank_of
from wanlora.runs import claim, run_folder
from wanlora.store import index
from wanlora.store.views import View, read_view
from wanlora.training.cached_clips import check_encodings
from wanlora.wan.model_folder import TRANSFORMER, resolve_here
from wanlora.wan.variants import variant_of


def check(config: TrainConfig) -> View:
    """Refuse settings, a folder, a cache, a model or an adapter that cannot be used.

    A model of the hub is not downloaded here; it is checked when it is.

    Returns:
        The view of the cache.

    Raises:
        WanloraError: Names what cannot be used.
    """
    if rank_of(os.environ).world == 1:  # of several processes, the first one checks it for all
        # Settings are compared when the device is known, which decides `dtype`.
        claim.open_run(config.output_dir, {}, resume=config.resume, resolve=lambda _: {})
    index.open_store(config.cache)
    view = read_view(config.cache, config.view)
    choose(config, view)
    continues = config.resume and run_folder.newest_checkpoint(config.output_dir) is not None
    if config.init_adapter and not continues:  # a checkpoint has the weights; the file may be gone
        read_header(config.init_adapter)
    model = config.model or view.model
    if folder := resolve_here(model, TRANSFORMER):
        variant = variant_of(folder)
        check_encodings(view, variant, encode_again=encode_again(config, model))
        targets.match_targets(targets.linear_names(variant.num_layers), config.lora.targets)
    return view
