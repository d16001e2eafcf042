"""Coverage of the validation's 95 % interval when clips of one source resemble each other.

    python bench/coverage.py

Draws panels of G source groups with n clips each, many times. Each clip's difference to the base is
sqrt(r) x (a draw of its group) + sqrt(1 - r) x (a draw of its own), so clips of one group have
correlation r and the true mean difference is 0. Counts how often an interval contains 0: Student's
interval over clips, as in release 0.1.0, and the one over source groups that `train` and `evaluate`
report. Also prints the mean half-width, in standard deviations of one clip's difference.
"""

import argparse
import json

import numpy as np

from wanlora.core.intervals import mean_interval

SHAPES = ((8, 2), (4, 4), (16, 1))
"""Groups x clips per group: 16 clips each, the default panel."""
CORRELATIONS = (0.0, 0.3, 0.6, 0.9)


def measure(groups: int, clips: int, correlation: float, runs: int, seed: int) -> dict:
    """Coverage and mean half-width of both intervals, over `runs` simulated panels."""
    random = np.random.default_rng(seed)
    of_source = [str(index // clips) for index in range(groups * clips)]
    of_clip = [str(index) for index in range(groups * clips)]
    row = {"groups": groups, "clips_per_group": clips, "correlation": correlation, "runs": runs}
    inside, width = {"clips": 0, "groups": 0}, {"clips": 0.0, "groups": 0.0}
    for _ in range(runs):
        shared = np.repeat(random.standard_normal(groups), clips)
        own = random.standard_normal(groups * clips)
        values = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
        for name, names in (("clips", of_clip), ("groups", of_source)):
            low, high = mean_interval(values, names).ci95
            inside[name] += low < 0 < high
            width[name] += (high - low) / 2
    return (
        row
        | {f"coverage_over_{name}": count / runs for name, count in inside.items()}
        | {f"half_width_over_{name}": total / runs for name, total in width.items()}
    )


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        measure(groups, clips, correlation, options.runs, options.seed)
        for groups, clips in SHAPES
        for correlation in CORRELATIONS
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        "| groups x clips | correlation | over clips | over groups | half-width, clips | groups |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['groups']} x {row['clips_per_group']} | {row['correlation']:g} "
            f"| {row['coverage_over_clips']:.1%} | {row['coverage_over_groups']:.1%} "
            f"| {row['half_width_over_clips']:.2f} | {row['half_width_over_groups']:.2f} |"
        )


if __name__ == "__main__":
    main()
