"""docs/cache.md, step by step as it is printed, and each change costs what the table says."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.support import cli
from tests.support.caches import write_npz_clips

DOC = Path(__file__).parents[2] / "docs" / "cache.md"


def commands() -> list[list[str]]:
    """Every `wanlora` line of the page's sh blocks, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


def printed(*wanted: str) -> list[str]:
    """The command of the page that holds these words."""
    (found,) = (words for words in commands() if all(word in words for word in wanted))
    return found


@pytest.fixture
def lines(tmp_path, monkeypatch, micro_home) -> list[dict]:
    monkeypatch.chdir(tmp_path)
    manifest = write_npz_clips(Path("data") / "processed", num_clips=4)
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def run(words: list[str]) -> dict:
    extra = ["--model", "micro", "--device", "cpu"] if words[0] == "cache-latents" else []
    result = cli.invoke(*words, *extra, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def encode(lines: list[dict], name: str = "processed/train.jsonl") -> tuple[int, int]:
    """Write a manifest and run stage one as printed; clips and prompts that were encoded."""
    path = Path("data") / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if name == "processed/train.jsonl":
        words = next(w for w in commands() if w[0] == "cache-latents" and "--dry-run" not in w)
    else:
        words = printed("cache-latents", "walking")
    done = run(words)
    return done["clips_encoded"], done["prompts_encoded"]


def test_each_change_costs_what_the_page_says(lines):
    dry = run(printed("cache-latents", "--dry-run"))
    assert (dry["clips_encoded"], dry["prompts_encoded"]) == (4, 4)
    assert encode(lines) == (4, 4)  # 3 different captions of 4, and the empty prompt
    more = write_npz_clips(Path("data") / "processed", num_clips=6)
    everything = [json.loads(line) for line in more.read_text().splitlines()]
    assert encode(everything) == (2, 2)  # added
    assert encode(everything[:5]) == (0, 0)  # removed
    again = [*everything[:4], everything[4] | {"prompt": "Somebody jumping"}]
    assert encode(again) == (0, 1)  # re-captioned
    several = [again[0] | {"prompt": ["Clapping", "Applause", again[0]["prompt"]]}, *again[1:]]
    assert encode(several) == (0, 2)  # several captions
    moved = Path("data") / "processed" / "renamed.npz"
    (Path("data") / "processed" / "clip-001.npz").rename(moved)
    renamed = [several[0], several[1] | {"npz": "renamed.npz"}, *several[2:]]
    assert encode(renamed) == (0, 0)  # renamed
    chosen = [line | {"npz": f"processed/{line['npz']}"} for line in renamed[:2]]
    assert encode(chosen, "selection.jsonl") == (0, 0)  # selected

    looked = run(printed("inspect", "--html"))
    assert Path(looked["page"]).is_file()
    assert {view["name"]: view["clips"] for view in looked["views"]} == {"default": 5, "walking": 2}
    planned = run(printed("inspect", "--gc", "--dry-run"))["freed"]
    assert (planned["rows"], planned["young"]) == (0, 3)
    freed = run(["inspect", "cache", "--gc", "--set", "gc_min_age_h=0"])
    assert freed["freed"]["rows"] == 3  # a clip, its caption, and the caption that was replaced
    assert freed["clips"] == 5
    assert encode(renamed) == (0, 0)
    for words in (["inspect", "cache"], printed("inspect", "--verify", "fast"),
                  ["inspect", "cache", "--verify"], printed("inspect", "--repair")):  # fmt: skip
        assert words in commands()
        assert run(words)["invalid"] == []
    clip_id = json.loads(Path("cache/views/default.jsonl").read_text().splitlines()[1])["clip_id"]
    words = [clip_id if word == "CLIP_ID" else word for word in printed("inspect", "--decode")]
    assert Path(run(words)["decoded"][0]["video"]).is_file()
    trained = run([*printed("train"), "--max-steps", "1", "--device", "cpu",
                   "--set", "validation.every=0"])  # fmt: skip
    assert trained
