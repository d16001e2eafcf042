"""The code blocks of README.md and docs/ run as printed, page by page, in a small project.

Stand-ins: the micro model, videos of 96x160 px, few steps. Each is an option added to the printed
command; a later option wins.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import cli
from tests.support.doc_blocks import Block, blocks
from tests.support.experts import pair_folder
from tests.support.i2v import i2v_folder
from tests.support.videos import write_video

ON_CPU = ("--device", "cpu")
MICRO = ("--model", "micro", *ON_CPU)
SMALL = ("--height", "32", "--width", "48")
CLIP_SIZE = ("--num-frames", "17", *SMALL)
QUICK = ("--num-frames", "5", "--height", "32", "--width", "32", "--steps", "1")

ADDED: dict[str, tuple[str, ...]] = {
    "prepare": (*SMALL, "--val-fraction", "0.4", "--workers", "1"),
    "cache-latents": MICRO,
    "train": (
        *MICRO, "--max-steps", "2", "--batch-size", "1", "--gradient-accumulation-steps", "1",
        "--rank", "4", "--alpha", "4",
        "--set", "validation.num_clips=2", "--set", "validation.num_sigmas=2",
    ),
    "sample": (*MICRO, *QUICK, "--num-videos", "1"),
    "evaluate": (*ON_CPU, *QUICK, "--num-clips", "2", "--videos-per-activity", "1"),
    "watch": ("--once",),
    "export": ("--overwrite",),
}  # fmt: skip
"""Options that make a command small."""

STARTED = "outputs/full_training"
MODELS = {"docs/wan22.md": "pair", "docs/i2v.md": "image-pair"}
"""Folders of the models with two transformers, by the page that is about them."""
ACTIVITIES = ("clapping", "sitting", "walking")


def run(command: str, model: str = "micro") -> str:
    """Run a printed command with the added options; return its output."""
    launcher, name, *words = shlex.split(command, comments=True)
    assert launcher == "wanlora", f"mark the block as not run: {command}"
    added = ADDED.get(name, ())
    if name == "prepare" and "lengths=" not in command:
        added = (*added, *CLIP_SIZE[:2])
    if name == "train" and "--resume" in words:  # the run has its model; steps are done
        added = (*ON_CPU, "--max-steps", "3")
    if name in ("sample", "evaluate") and model == MODELS["docs/i2v.md"]:
        added = (*added, *CLIP_SIZE)  # videos start from the first frames of clips
    added = tuple(model if word == "micro" else word for word in added)
    result = cli.invoke(name, *words, *added)
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.output


def run_block(block: Block) -> None:
    if block.language == "python":
        exec(compile(block.text, block.page, "exec"), {})
    elif block.language == "toml":
        Path("job.toml").write_text(block.text)
        run("wanlora run job.toml --dry-run")
    else:
        for command in block.commands():
            own = "micro-i2v" if "micro-i2v" in command else "micro"
            run(command, MODELS.get(block.page, own) if own == "micro" else own)


@pytest.fixture(scope="module")
def walked(tmp_path_factory, micro_home) -> Path:
    """A project after the README's walk-through: data, cache, and a run."""
    project = tmp_path_factory.mktemp("walk") / "project"
    for number in range(6):
        activity = ACTIVITIES[number % 3]
        video = project / "videos" / activity / f"{number}.mp4"
        write_video(video, num_frames=40 + number, gop=30)
        video.with_suffix(".txt").write_text(f"A person {activity}, take {number}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        for block in blocks():
            if block.page == "README.md" and block.runs:
                run_block(block)
    return project


def prepare_page(page: str) -> None:
    """Put files in place that a page takes as given."""
    if page == "docs/training.md":  # it starts outputs/run itself
        photo = Path("photos", "photo.png")
        photo.parent.mkdir()
        Image.new("RGB", (160, 96), "red").save(photo)
        photo.with_suffix(".txt").write_text("A red wall")
        return
    if page == "docs/i2v.md":
        i2v_folder(Path(MODELS[page]), clip=False, experts=True)
        Image.new("RGB", (160, 96), "red").save("photo.jpg")
        return
    if page == "docs/wan22.md":
        pair_folder(Path(MODELS[page]))
        for expert in ("high", "low"):  # as another tool writes them, without our header
            tensors = load_file(Path(STARTED, "pytorch_lora_weights.safetensors"))
            save_file(tensors, f"theirs_{expert}.safetensors")
        return
    shutil.copytree(STARTED, "outputs/run")
    if page == "docs/adapters.md":
        shutil.copy(Path(STARTED, "pytorch_lora_weights.safetensors"), "theirs.safetensors")
    if page == "docs/evaluation.md":
        for name in ("a", "b", "style"):
            shutil.copytree(STARTED, Path("outputs", name))
        Path("prompts.txt").write_text("# two prompts\nA person walking\nA person sitting\n")
    if page == "docs/coming-from.md":  # its last section trains there
        shutil.rmtree(STARTED)


PAGES = sorted({block.page for block in blocks() if block.runs} - {"README.md"})


def test_the_walk_through_of_the_readme_runs(walked):
    for path in ("cache/store.zarr", f"{STARTED}/run.html", "outputs/evaluation/report.html",
                 "base-and-adapter.mp4", "person.safetensors"):  # fmt: skip
        assert (walked / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page, walked, tmp_path, monkeypatch):
    shutil.copytree(walked, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    prepare_page(page)
    for block in blocks():
        if block.page == page and block.runs:
            run_block(block)


@pytest.mark.parametrize(
    "block", [block for block in blocks() if block.kind == "output of"], ids=lambda b: b.value
)
def test_a_quoted_output_is_printed(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, *words = shlex.split(block.value)
    printed = " ".join(cli.invoke(*words).output.split())
    for line in block.text.splitlines():
        parts = [re.escape(part.strip()) for part in line.split("…")]
        assert re.search(".*".join(parts), printed), printed
