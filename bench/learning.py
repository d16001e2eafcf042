"""Does the micro model learn what it has never seen, on any seed, and what does it forget?

    python bench/learning.py --seeds 0 1 2 3 4 --output-dir outputs/learning

For each seed: the demo's videos, both stages with the demo's settings; then the held-out loss of
the concept as a paired difference to the base, clips made from fresh prompts and recognised, and
the loss on held-out clips of everything that the base knows. The controls are the base and an
adapter of another concept. What is forgotten is also measured of an adapter for which no known
videos were mixed in. Continues where it was stopped; ends with a table, and `learning.json`.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from wanlora.commands.demo import demo, measure
from wanlora.files import write_json
from wanlora.micro import world

KNOWN_PER_CONCEPT, KNOWN_FIRST_SEED = 8, 4_000_000
"""Held-out clips of what the base knows; nothing is trained with their seeds."""


def taught(folder: Path, concept: str, seed: int, *, num_known: int = 24) -> Path:
    """Run the demo's three commands that make an adapter; return the run's folder."""
    run_dir = folder / "run"
    if not (run_dir / "pytorch_lora_weights.safetensors").exists():
        demo.draw_videos(folder / "videos", concept, num_known=num_known, seed=seed)
        for command in demo.commands(folder, max_steps=200, seed=seed):
            if command[0] in ("prepare", "cache-latents", "train"):
                demo.wanlora(*command)
    return run_dir


def known_cache(folder: Path) -> Path:
    """A cache of held-out clips of what the base knows."""
    cache = folder / "cache"
    if not (cache / "views").exists():
        seeds = range(KNOWN_FIRST_SEED, KNOWN_FIRST_SEED + KNOWN_PER_CONCEPT)
        wanted = [(concept, seed, "val") for concept in world.KNOWN for seed in seeds]
        demo.write_videos(folder / "videos", wanted)
        size = [part for name, value in demo.CLIP.items() for part in (f"--{name}", value)]
        demo.wanlora("prepare", folder / "videos", "--output", folder / "data", *size)
        demo.wanlora("cache-latents", "--manifest", folder / "data", "--cache", cache,
                      "--model", "micro")  # fmt: skip
    return cache


def change_pct(run_dir: Path, cache: Path, name: str) -> dict[str, Any]:
    """Paired change of the held-out loss over a cache, in percent of the base's."""
    output = run_dir.parent / name
    if not (output / "evaluation.json").exists():
        demo.wanlora("evaluate", "--adapter", run_dir, "--cache", cache, "--output-dir", output,
                      "--videos-per-activity", 0, "--num-clips", 1000)  # fmt: skip
    found = json.loads((output / "evaluation.json").read_text())["validation"]
    percent = 100 / found["base"]
    return {
        "mean": round(percent * found["paired_difference"], 1),
        "ci95": [round(percent * end, 1) for end in found["ci95"]],
    }


def measured(seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Everything about one seed."""
    root = given.output_dir
    made = {
        "adapter": taught(root / f"{given.concept}-{seed}", given.concept, seed),
        "unrelated": taught(root / f"{given.control}-{seed}", given.control, seed),
    }
    alone = taught(root / f"{given.concept}-{seed}-alone", given.concept, seed, num_known=0)
    scenes = measure.scenes(given.concept, given.clips, seed=seed)
    known = known_cache(root / "known")
    return {
        "seed": seed,
        "learned_pct": change_pct(made["adapter"], made["adapter"].parent / "cache", "learned"),
        "recognised": {
            name: measure.make_clips(scenes, adapter, seed=seed).share(given.concept)
            for name, adapter in ({"base": None} | made).items()
        },
        "forgotten_pct": change_pct(made["adapter"], known, "forgotten"),
        "forgotten_alone_pct": change_pct(alone, known, "forgotten"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """What docs/benchmarks.md shows."""
    lines = [
        "| seed | held-out loss of what is taught | recognised: base, unrelated, adapter "
        "| loss of what was known | without known videos |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        shares = [f"{row['recognised'][name]:.0%}" for name in ("base", "unrelated", "adapter")]
        changes = [
            f"{change['mean']:+.1f} % ({change['ci95'][0]:+.1f} to {change['ci95'][1]:+.1f})"
            for name in ("learned_pct", "forgotten_pct", "forgotten_alone_pct")
            for change in (row[name],)
        ]
        cells = [str(row["seed"]), changes[0], ", ".join(shares), *changes[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--concept", default="clapping", choices=world.HELD_OUT)
    parser.add_argument("--control", default="triangle", choices=world.HELD_OUT,
                        help="concept of the unrelated adapter")  # fmt: skip
    parser.add_argument("--clips", type=int, default=24, help="made by each model")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/learning"))
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for seed in given.seeds:
        rows.append(measured(seed, given))
        write_json(given.output_dir / "learning.json", rows)
    print(table(rows))


if __name__ == "__main__":
    main()
