"""The first hour of a person who has never seen wanlora, typed in a terminal of 80 columns.

Real videos, the real command line, and no more knowledge than what the commands print: the `next:`
line of a command is the next one typed, and a refusal names what to type instead.
"""

import json
import re
import shlex
import shutil

import pytest

from tests.support import terminal
from tests.support.videos import real_videos

CAPTIONS = {
    "bigbuckbunny": "a rabbit leaves its hole",
    "bikes": "people ride bikes in a street",
    "carphone_pristine": "a man talks in a car",
}


class Newcomer:
    """Types commands in a folder; `text` is what the last one printed, on one line."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.typed: list[str] = []
        self.text = ""

    def types(self, line: str, exit_code: int = 0) -> str:
        self.typed.append(line)
        words = shlex.split(line)
        assert words.pop(0) == "wanlora"
        shown = terminal.run(*words, width=80, cwd=self.folder)
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[│╭╮╰╯─]", "", shown.raw.decode())
        self.text = " ".join(plain.split())
        assert shown.code == exit_code, self.text
        return self.text

    def next(self) -> str:
        """The command that the last one printed."""
        (found,) = re.findall(r"next: (wanlora .*?)(?=$| next: | for ComfyUI)", self.text)
        return found


@pytest.fixture
def newcomer(tmp_path, micro_home) -> Newcomer:
    (tmp_path / "videos").mkdir()
    for name, path in real_videos().items():
        shutil.copy(path, tmp_path / "videos" / f"{name}.mp4")
    return Newcomer(tmp_path)


def test_from_three_videos_to_a_sample_by_what_the_commands_print(newcomer):
    videos = newcomer.folder / "videos"
    cut = "--num-frames 17 --height 64 --width 64"

    # No captions yet: the refusal names the file to write.
    assert ".txt" in newcomer.types(f"wanlora prepare videos/ {cut}", exit_code=1)
    for name, caption in CAPTIONS.items():
        (videos / f"{name}.txt").write_text(caption)
    newcomer.types(f"wanlora prepare videos/ {cut}")
    assert newcomer.next() == "wanlora verify data/processed"
    newcomer.types(newcomer.next())
    assert newcomer.next().startswith("wanlora cache-latents")

    # No GPU here: the refusal names the small model, and the small model says what it is.
    assert "--model micro" in newcomer.types(newcomer.next(), exit_code=1)
    assert "toy" in newcomer.types("wanlora cache-latents --model micro")
    started = newcomer.next()
    assert started == "wanlora train --cache cache --output-dir outputs/run"

    # Names from other trainers lead to the right ones.
    assert "--rank" in newcomer.types(f"{started} --network_dim 4", exit_code=2)
    assert "--max-steps" in newcomer.types(f"{started} --max_train_steps 4", exit_code=2)
    trained = newcomer.types(
        f'{started} --rank 4 --lr 1e-3 --max-steps 4 --preview-prompt "a cat rides a bike"'
    )
    run = newcomer.folder / "outputs" / "run"
    assert "outputs/run/run.html" in trained
    assert "a cat rides a bike" in (run / "run.html").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "done"

    # The same command again loses nothing and names the short way to continue.
    adapter = (run / "pytorch_lora_weights.safetensors").read_bytes()
    again = newcomer.types(f"{started} --rank 4 --lr 1e-3 --max-steps 4", exit_code=1)
    assert "wanlora train --output-dir outputs/run --resume" in again
    assert (run / "pytorch_lora_weights.safetensors").read_bytes() == adapter
    newcomer.types("wanlora train --output-dir outputs/run --resume --max-steps 5")
    assert (run / "pytorch_lora_weights.safetensors").read_bytes() != adapter

    follow = newcomer.next()
    assert follow == 'wanlora sample --adapter outputs/run --prompt "..."'
    newcomer.types(follow.replace("...", "a man talks in a car") + " --steps 2")
    assert list((newcomer.folder / "outputs").rglob("*.mp4"))
    assert "run" in newcomer.types("wanlora watch outputs --once")
    assert len(newcomer.typed) == 12
