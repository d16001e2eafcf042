"""The two stages teach: the micro model learns what it has never seen, and by its name."""

import json

import pytest

from tests.support import cli
from tests.support.drawn import write_drawn_clips

CONCEPTS = ("clapping", "triangle")
STEPS = 40
FAST = (
    "--max-steps", STEPS, "--batch-size", 4, "--learning-rate", 4e-3,
    "--set", "lora.rank=8", "--set", "optimizer.warmup_steps=5", "--set", "trackers=[]",
    "--set", "validation.train_clips=false",
    "--set", "validation.num_clips=8", "--set", "validation.num_sigmas=4",
)  # fmt: skip


def held_out(folder, **settings) -> dict:
    """Both stages over drawn clips: the last validation, on clips with their own captions."""
    data = write_drawn_clips(folder / "data", CONCEPTS, num_train=12, num_val=4, **settings)
    for arguments in (
        ("cache-latents", "--manifest", data, "--cache", folder / "cache", "--model", "micro"),
        ("train", "--cache", folder / "cache", "--output-dir", folder / "run", *FAST),
    ):
        done = cli.invoke(*arguments)
        assert done.exit_code == 0, done.output
    rows = (folder / "run" / "validation.jsonl").read_text().splitlines()
    return json.loads(rows[-1])


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> dict:
    return held_out(tmp_path_factory.mktemp("taught"))


def test_a_short_run_lowers_the_loss_on_held_out_clips(taught):
    assert taught["ci95"][1] < 0, taught
    assert taught["difference"] < -0.05 * taught["base_mean"]


def test_shuffled_captions_do_not_teach_the_prompt(taught, tmp_path):
    shuffled = held_out(tmp_path, shuffled=True)
    assert shuffled["base_mean"] == pytest.approx(taught["base_mean"])  # the same pairs
    assert shuffled["difference"] > taught["difference"] / 2
