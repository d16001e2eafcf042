"""Damaged files through `wanlora prepare` and `verify`: what becomes of them.

python bench/prepare_fuzz.py [COUNT] [SEED]
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support import fuzz


def main(count: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        written = fuzz.write_damaged(root / "raw", fuzz.originals(root / "whole"), count, seed=seed)
        command = [
            sys.executable, "-m", "wanlora", "prepare", str(root / "raw"), "--output",
            str(root / "out"), "--num-frames", "17", "--height", "48", "--width", "80",
            "--val-fraction", "0", "--set", "stall_s=30",
        ]  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=7200, check=False)
        seconds = time.monotonic() - start
        if done.returncode != 3 or "Traceback" in done.stderr:
            sys.exit(f"exit code {done.returncode}\n{done.stderr[-4000:]}")
        lines = (root / "out" / "errors.jsonl").read_text().splitlines()
        errors = [json.loads(line) for line in lines]
        lost = [row for row in errors if "killed" in row["message"] or "hung" in row["message"]]
        command[3:] = ["verify", str(root / "out"), "--json"]
        verified = subprocess.run(
            command, capture_output=True, text=True, timeout=7200, check=False
        )
        failed = json.loads(verified.stdout)["failed"]
        print(
            f"{len(written)} files in {seconds:.0f} s: {len(errors)} refused, "
            f"{len(written) - len(errors)} used, {len(lost)} crashes or hangs"
        )
        print("by reason:", dict(Counter(row["code"] for row in errors).most_common()))
        print(f"verify: {len(failed)} of the clips made from the others fail")
        for row in (*lost, *failed):
            print(row)


if __name__ == "__main__":
    main(*map(int, (*sys.argv[1:], *(500, 0)[len(sys.argv) - 1 :])))
