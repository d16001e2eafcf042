"""Identity and origin of a run: what a checkpoint, an adapter and all processes must agree on.

Owns: these dictionaries. Must not know: how a checkpoint or an adapter's header is written.
"""

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from wanlora import __version__
from wanlora.commands.train.data import Data
from wanlora.core.buckets import usual
from wanlora.cost.memory import Quantize
from wanlora.runs.git import git_commit
from wanlora.store.views import View, frame_rate
from wanlora.training.masters import Masters
from wanlora.wan.variants import Expert, Variant

PLACES = ("cache", "output_dir", "model", "manifest", "init_adapter", "local_copy", "device")
"""Settings that name places. They may differ between nodes; what is stored there may not."""


def identity_of(
    view: View, *, variant: Variant, base: str, expert: Expert | None, quantize: Quantize = "none"
) -> dict[str, Any]:
    """Data and base model of a run: a checkpoint is continued only with the same ones.

    Args:
        view: The cache's view.
        variant: The transformer's variant.
        base: Fingerprint of its weights.
        expert: The transformer of the variant that is trained; None if it has one.
        quantize: Format of the weights in its blocks.
    """
    return {
        "base": base,
        "view_sha256": view.sha256,
        **{kind: view.fingerprint(kind) for kind in variant.kinds},
        "variant": variant.name,
        **({"expert": expert} if expert else {}),
        **({"quantize": quantize} if quantize != "none" else {}),
    }


def provenance(data: Data, *, model: str, identity: Mapping[str, Any]) -> dict[str, str]:
    """Origin of the adapter, for its header. Without a date, so equal runs write equal files.

    Args:
        data: The run's data.
        model: The model as given.
        identity: From `identity_of`.
    """
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "peft", "numpy")}
    commit = git_commit(Path.cwd())
    size = usual(clip.bucket for clip in data.clips)
    return {
        "model": model,
        "wanlora": __version__,
        **versions,
        **({"git_commit": commit} if commit else {}),
        **{key: str(value) for key, value in identity.items()},
        "store_digest": data.source.reader.digest,
        "seed": str(data.source.seed),
        "sampler": data.source.sampler,
        "shift": str(data.source.shift),
        "fps": f"{frame_rate(data.clips):g}",
        **{name: str(value) for name, value in size._asdict().items()},
    }


def shared_facts(
    settings: Mapping[str, Any], identity: Mapping[str, Any], *, end_step: int, masters: Masters
) -> dict[str, Any]:
    """Facts that must be equal in all processes, or their gradients belong to different runs.

    Args:
        settings: All settings, with the values of those that are None or auto.
        identity: From `identity_of`.
        end_step: Number of steps of the whole run.
        masters: The adapter's first weights.
    """
    digest = hashlib.sha256()
    for master in masters.parameters.values():
        digest.update(master.detach().cpu().numpy().tobytes())
    return {
        "settings": {key: value for key, value in settings.items() if key not in PLACES},
        "wanlora": __version__,
        "end_step": end_step,
        "adapter": digest.hexdigest(),
        **identity,
    }
