"""The losses of a fixed run, kept in a file: a change of numerics shows here first.

If a change is meant to alter them, run `python tests/numerics/test_golden.py` and say why in the
commit; the file records what made it.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
STEPS = 12


def _losses(folder: Path) -> list[float]:
    from tests.support import cli
    from tests.support.caches import write_npz_clips

    manifest = write_npz_clips(folder / "data", num_clips=5, size=(9, 32, 32), seed=1)
    cache, run_dir = folder / "cache", folder / "run"
    for arguments in (
        # In bfloat16, releases of transformers round the embeddings differently.
        (
            "cache-latents", "--manifest", manifest, "--cache", cache, "--model", "micro",
            "--set", "text_dtype=float32",
        ),
        (
            "train", "--cache", cache, "--output-dir", run_dir, "--max-steps", STEPS,
            "--gradient-accumulation-steps", 2, "--learning-rate", 1e-3, "--seed", 7,
            "--set", "lora.rank=4", "--set", "optimizer.warmup_steps=4", "--set", "trackers=[]",
            "--set", "validation.every=0", "--set", "caption_dropout=0.2",
        ),
    ):  # fmt: skip
        done = cli.invoke(*arguments)
        assert done.exit_code == 0, done.output
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def test_losses_are_those_of_the_golden_file(micro_home, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    # Other processors round matrix products otherwise; the decimals that matter are the first.
    np.testing.assert_allclose(_losses(tmp_path), golden["losses"], rtol=1e-4)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    with tempfile.TemporaryDirectory() as temporary:
        made = {
            "made by": "python tests/numerics/test_golden.py",
            "torch": torch.__version__,
            "numpy": np.__version__,
            "machine": platform.machine(),
            "losses": _losses(Path(temporary)),
        }
    GOLDEN.write_text(json.dumps(made, indent=2) + "\n")
