"""Does the micro model learn what it has never seen, on any seed, and what does it forget?

    python bench/learning.py --seeds 0 1 2 3 4 --output-dir outputs/learning

For each seed: draw the demo's videos, both stages with the demo's settings, held-out loss of the
concept as a paired difference to the base, clips made from fresh prompts and recognised, and the
loss on held-out clips of everything the base knows. Adapters of another concept on the same prompts
are the control. `--known-videos 0` shows what mixing known videos in is good for.
"""

import argparse
import json
import logging
from pathlib import Path

from wanlora.config import DemoConfig
from wanlora.demo import measure, stage


def taught(config: DemoConfig) -> Path:
    """Run the demo's three commands that make an adapter, in this process; returns the run."""
    run_dir = config.output_dir / "run"
    if (run_dir / "pytorch_lora_weights.safetensors").exists():
        return run_dir
    stage.draw_videos(config.output_dir / "videos", config)
    wanted = ("prepare", "cache-latents", "train")
    for command in stage.commands(config):
        if command[0] in wanted:
            stage.wanlora(*command)
    return run_dir


def held_out(run_dir: Path) -> dict:
    """The last validation of a run on held-out clips."""
    rows = [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "val"][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--concept", default="clapping")
    parser.add_argument("--control", default="triangle", help="concept of the unrelated adapter")
    parser.add_argument("--known-videos", type=int, default=24)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/learning"))
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for seed in given.seeds:
        made = {}
        for concept in (given.concept, given.control):
            folder = given.output_dir / f"{concept}-{seed}-{given.known_videos}"
            config = DemoConfig(output_dir=folder, concept=concept, seed=seed,
                                known_videos=given.known_videos)  # fmt: skip
            made[concept] = taught(config)
        scenes = measure.scenes(given.concept, given.clips, seed=seed)
        shares = {
            name: measure.make_clips(scenes, adapter, seed=seed).share(given.concept)
            for name, adapter in (("base", None), ("adapter", made[given.concept]),
                                  ("unrelated", made[given.control]))
        }  # fmt: skip
        row = held_out(made[given.concept])
        figures = {key: row[key] for key in ("difference", "ci95", "per_activity")}
        print(json.dumps({"seed": seed, **shares, **figures}), flush=True)


if __name__ == "__main__":
    main()
