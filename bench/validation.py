"""How well the validation loss tells two models apart, beside the usual ways of measuring it.

    python bench/validation.py --run outputs/demo/run --cache outputs/demo/cache

Takes a run and measures the difference between its adapter and the base many times over, each time
with other noise: paired on the fixed grid of sigmas (as `wanlora train` validates), with fresh
noise
for either model on that grid, and with random sigmas for either. Prints the spread of each.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wanlora.adapters.file import LoraShape, read_adapter
from wanlora.adapters.lora import add_adapter
from wanlora.commands.train.opening_data import open_data
from wanlora.commands.train.preflight import select
from wanlora.config import TrainConfig
from wanlora.core.rng import Stream, uniform
from wanlora.training import flow
from wanlora.training.validation import Panel, losses, make_panel
from wanlora.wan.model_folder import resolve
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import variant_of

DEVICE, DTYPE = torch.device("cpu"), torch.float32


def load(run: Path, cache: Path, model: str):
    """The base with the run's adapter in it, and the data of the cache's default view."""
    folder = resolve(model, ["transformer"])
    variant = variant_of(folder)
    config = TrainConfig(cache=cache)
    data = open_data(config, variant, select(config))
    transformer = load_transformer(folder, dtype=DTYPE, device=DEVICE)
    found = read_adapter(run)
    shape = LoraShape(
        rank=found.metadata["transformer.r"],
        alpha=found.metadata["transformer.lora_alpha"],
        targets=found.metadata["transformer.target_modules"],
    )
    parameters = add_adapter(transformer, shape, seed=0)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found.tensors[name])
    return transformer, data


def with_random_sigmas(panel: Panel, source, seed: int) -> Panel:
    """The same clips with as many sigmas drawn anew."""
    sigmas = (
        flow.sigma_of(uniform(seed, Stream.SIGMA, 0, q), sampler=source.sampler, shift=source.shift)
        for q in range(len(panel.sigmas))
    )
    return replace(panel, sigmas=tuple(sorted(sigmas)))


def differences(transformer, data, panel: Panel, repeats: int) -> dict[str, list[float]]:
    """Estimates of mean loss difference by each way of measuring, one a repeat."""

    def mean(seed: int, *, adapted: bool, sigmas: Panel = panel) -> float:
        (transformer.enable_adapters if adapted else transformer.disable_adapters)()
        source = replace(data.source, seed=seed)
        return float(losses(sigmas, transformer, source, device=DEVICE, dtype=DTYPE).mean())

    found: dict[str, list[float]] = {"paired": [], "fresh noise": [], "random sigmas": []}
    for repeat in range(repeats):
        a, b = 2 * repeat, 2 * repeat + 1
        adapter_a, base_a = mean(a, adapted=True), mean(a, adapted=False)
        found["paired"].append(adapter_a - base_a)
        found["fresh noise"].append(mean(b, adapted=True) - base_a)
        found["random sigmas"].append(
            mean(a, adapted=True, sigmas=with_random_sigmas(panel, data.source, a))
            - mean(b, adapted=False, sigmas=with_random_sigmas(panel, data.source, b))
        )
    return found


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--sigmas", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformer, data = load(options.run, options.cache, options.model)
    panel = make_panel(
        "train", data.clips, data.source, num_clips=options.clips, num_sigmas=options.sigmas
    )
    found = differences(transformer, data, panel, options.repeats)
    base = float(np.std(found["paired"], ddof=1))
    result = {
        "pairs": len(panel.clips) * len(panel.sigmas),
        "repeats": options.repeats,
        "difference": float(np.mean(found["paired"])),
        "standard_deviation": {name: float(np.std(v, ddof=1)) for name, v in found.items()},
        "ratio_to_paired": {name: float(np.std(v, ddof=1)) / base for name, v in found.items()},
    }
    print(f"difference {result['difference']:+.5f} over {result['pairs']} pairs")
    for name, spread in result["standard_deviation"].items():
        print(f"{name:14} sd {spread:.6f}  {result['ratio_to_paired'][name]:8.1f} x paired")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
