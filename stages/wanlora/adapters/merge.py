"""Merge adapters into their base: a whole model folder that needs no LoRA loader.

Owns: the merged transformers, written shard by shard with the base's names and types, and the check
of the weights that diffusers loads from it. The other parts of the model are the base's own files.

Legend: W is `out in`; plain LoRA W' = W + dW, DoRA W' = m (W + dW) / |W + dW| row by row.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from diffusers import WanTransformer3DModel
from jaxtyping import Float, Float64
from torch import Tensor

from wanlora.adapters.file import AdapterFile
from wanlora.adapters.lora import check_adapter_fits
from wanlora.adapters.tensor_file import write_tensors
from wanlora.adapters.updates import Update, dense
from wanlora.errors import AdapterError
from wanlora.wan.model_folder import INDEX, SECOND, TRANSFORMER, pipeline_of
from wanlora.wan.transformer import load_transformer
from wanlora.wan.weights import read_json, weight_files

Updates = Mapping[str, Update]
"""Update of each module."""

_FIRST_LINEAR = "blocks.0.attn1.to_q.weight"


def check_base(part: Path, adapter: AdapterFile) -> None:
    """Refuse an adapter made for another model, from the configuration alone.

    Args:
        part: Sub-folder with the transformer.
        adapter: The adapter.

    Raises:
        AdapterError: See `check_adapter_fits`.
    """
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(read_json(part / "config.json"))
    check_adapter_fits(adapter, model)


def write_merged(
    model_dir: Path, updates: Mapping[str, Updates], target: Path, *, dtype: torch.dtype | None
) -> list[str]:
    """Fill an empty folder with the merged model, one tensor in memory at a time.

    Files that do not change (the VAE, the text encoder, the tokenizer, the scheduler, and a
    transformer without an adapter) are hard links if the disk supports them, because they are
    gigabytes; otherwise copies.

    Args:
        model_dir: The complete folder of the base.
        updates: From `AdapterFile.updates`, by the sub-folder of their transformer.
        target: Empty folder.
        dtype: Type of the weights of all transformers; None = the base's. Modules that diffusers
            keeps in fp32 are never narrowed.

    Returns:
        Sub-folders of the transformers that were written, to be checked; the others are links.
    """
    written = []
    for name in pipeline_of(model_dir):
        (target / name).mkdir()
        is_written = name in updates or (dtype is not None and name in (*TRANSFORMER, SECOND))
        for file in (model_dir / name).iterdir():
            if file.is_file() and not (is_written and ".safetensors" in file.name):
                _link(file, target / name / file.name)
        if is_written:
            _write_transformer(model_dir / name, updates.get(name, {}), target / name, dtype)
            written.append(name)
    _link(model_dir / INDEX, target / INDEX)
    return written


def _write_transformer(
    base: Path, updates: Updates, target: Path, dtype: torch.dtype | None
) -> None:
    num_bytes = 0
    for shard in weight_files(base):
        num_bytes += _write_shard(shard, updates, target / shard.name, dtype)
        shutil.copymode(shard, target / shard.name)
    for index in base.glob("*.safetensors.index.json"):
        value = read_json(index) | {"metadata": {"total_size": num_bytes}}
        (target / index.name).write_text(json.dumps(value, indent=2) + "\n")


def _write_shard(shard: Path, updates: Updates, target: Path, dtype: torch.dtype | None) -> int:
    """Write the merged tensors of a file of the base; returns their bytes."""
    sizes = {n: (_merged_type(n, w.dtype, dtype), tuple(w.shape)) for n, w in _tensors(shard)}
    with safetensors.safe_open(shard, framework="pt") as opened:

        def merged(name: str) -> Tensor:
            w: Tensor = opened.get_tensor(name)
            update = updates.get(name.removesuffix(".weight"))
            return (w if update is None else merged_weight(w, update)).to(sizes[name][0])

        return write_tensors(target, sizes, merged)


def check_merged(model_dir: Path, merged_dir: Path, part: str, updates: Updates) -> float:
    """Load a merged transformer with diffusers and compare every weight with the base's.

    Args:
        model_dir: Folder of the base.
        merged_dir: Folder that `write_merged` filled.
        part: Sub-folder of the transformer.
        updates: Updates that were merged into it.

    Returns:
        The largest |W' - W - dW| / |dW| of a module, Frobenius norms: the share of an
        update that is lost by rounding to the merged type.

    Raises:
        AdapterError: A weight differs from W + dW by more than one rounding, or from W if
            it has no update.
        ModelError: diffusers does not load it.
    """
    types = {n: w.dtype for f in weight_files(merged_dir / part) for n, w in _tensors(f)}
    merged = load_transformer(
        merged_dir, dtype=types[_FIRST_LINEAR], device=torch.device("cpu"), subfolder=part
    )
    loaded = merged.state_dict()
    largest = 0.0
    for shard in weight_files(model_dir / part):
        for name, base in _tensors(shard):
            update = updates.get(name.removesuffix(".weight"))
            exact = base.double() if update is None else merged_weight(base, update)
            found = loaded[name].double()
            bound = torch.finfo(types[name]).eps * exact.abs() + torch.finfo(types[name]).tiny
            if not bool(((found - exact).abs() <= bound).all()):
                raise AdapterError(
                    f"the merged weight {name} of {part} that diffusers loads is not the base's "
                    "with its update: nothing was kept; is the base's folder being changed?"
                )
            if update is not None and bool(update.b.any()):
                change = (exact - base.double()).norm()
                largest = max(largest, float((found - exact).norm() / change))
    return largest


def merged_weight(w: Float[Tensor, "out in"], update: Update) -> Float64[Tensor, "out in"]:
    """Compute W' in float64."""
    total = w.double() + dense(update)
    if update.magnitude is None:
        return total
    rows: Tensor = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    return update.magnitude.double()[:, None] * total / rows


def _merged_type(name: str, base: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Type of a merged tensor; see `write_merged`."""
    kept = set(name.split(".")) & set(WanTransformer3DModel._keep_in_fp32_modules)  # noqa: SLF001
    if dtype is None:
        return base
    return torch.promote_types(base, dtype) if kept else dtype


def _tensors(shard: Path) -> Iterator[tuple[str, Tensor]]:
    with safetensors.safe_open(shard, framework="pt") as opened:
        for name in sorted(opened.keys()):
            yield name, opened.get_tensor(name)


def _link(source: Path, target: Path) -> None:
    source = source.resolve()  # a hub cache holds symbolic links to its blobs
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
