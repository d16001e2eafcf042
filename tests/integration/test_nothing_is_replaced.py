"""Every command, given a place that holds somebody's work: no byte of it changes."""

import shutil
from pathlib import Path

import pytest

from tests.support import cli
from wanlora import files
from wanlora.config import COMMANDS
from wanlora.report.generated import marked, require_own_page
from wanlora.report.page import page
from wanlora.runs import run_folder

FIXTURE = Path(__file__).parent.parent / "fixtures" / "v0.1.0"
MINE = b"hours of my work\n"
EDITED_PAGE = marked(page("wanlora verify", ["a"]), "verify").replace("<p>a", "<p>my note")
OTHERS_PAGE = marked(page("Cache x", ["a"]), "inspect")
CLIP = "s1-6d4ec3ad-000000"

WRITE_NO_FILES = {"estimate", "watch", "config", "run"}
"""Commands without files of their own; `run` starts the others."""

PREPARE = ("prepare", "videos", "--num-frames", "17", "--height", "64", "--width", "96",
           "--output", "work", "--set", "workers=1")  # fmt: skip
TRAIN = ("train", "--cache", "cache", "--output-dir", "work", "--device", "cpu", "--max-steps", "1")
SAMPLE = ("sample", "--model", "micro", "--prompt", "a dog", "--steps", "1")
EVALUATE = ("evaluate", "--adapter", "run", "--cache", "cache", "--output-dir", "work",
            "--videos-per-activity", "0")  # fmt: skip
EXPORT = ("export", "--adapter", "run", "--output")
FOREIGN_RUN = {"config.toml": b"# wanlora: 0.1.0\nseed = 0\n", "metrics.jsonl": b""}

CASES = [
    ((*PREPARE, "--html", "work/plan.html"), {"plan.html": MINE}),
    (PREPARE, {"train.jsonl": b'{"video": "a.mp4", "caption": "mine"}\n'}),
    (PREPARE, {"errors.jsonl": MINE}),
    (PREPARE, {"sources.json": b'{"sources": [1, 2]}'}),
    (("verify", "data", "--html", "work/a.html"), {"a.html": MINE}),
    (("verify", "data", "--html", "work/a.html"), {"a.html": EDITED_PAGE.encode()}),
    (("verify", "data", "--html", "work/a.html"), {"a.html": OTHERS_PAGE.encode()}),
    (("verify", "data", "--html", "work/a.jsonl"), {"a.jsonl": MINE}),
    (("cache-latents", "--manifest", "data", "--cache", "work", "--model", "micro"),
     {"sources.json": b'{"videos": ["a"]}'}),
    (("cache-latents", "--manifest", "data", "--cache", "work", "--model", "micro"),
     {"sources.json": b'{"../videos/a.mp4": [1, 2, "ab"]}'}),  # prepare's
    (("cache-latents", "--manifest", "data", "--cache", "work", "--model", "micro"),
     {"views/default.json": MINE}),
    (("inspect", "cache", "--html", "work/a.html"), {"a.html": MINE}),
    (("inspect", "cache", "--decode", CLIP, "--output-dir", "work", "--device", "cpu"),
     {f"{CLIP}.mp4": MINE}),
    (TRAIN, {"README.md": MINE}),
    (TRAIN, {"config.toml": MINE}),
    ((*TRAIN, "--resume"), {"notes.txt": MINE, "src/main.py": MINE}),
    (TRAIN, {run_folder.ADAPTER_NAME: MINE}),
    ((*TRAIN, "--resume"), FOREIGN_RUN | {run_folder.ADAPTER_NAME: MINE}),
    (TRAIN, FOREIGN_RUN | {f"best/{run_folder.ADAPTER_NAME}": MINE, "README.md": MINE}),
    ((*TRAIN, "--resume"), FOREIGN_RUN | {f"ema/{run_folder.ADAPTER_NAME}": MINE}),
    ((*SAMPLE, "--output", "work/a.mp4"), {"a.mp4": MINE}),
    ((*SAMPLE, "--output", "work/a.mp4"), {"a.json": MINE}),
    ((*SAMPLE, "--output", "work/a.mp4", "--skip-existing"), {"a.mp4": MINE}),
    ((*SAMPLE, "--output", "work/a.mp4", "--skip-existing"), {"a.json": MINE}),
    ((*SAMPLE, "--output-dir", "work"), {"000-a-dog-seed0.mp4": MINE}),
    (EVALUATE, {"report.html": MINE}),
    (EVALUATE, {"evaluation.json": b'{"accuracy": 1}'}),
    (EVALUATE, {"losses.json": b'{"epoch 1": 0.5}'}),
    ((*EXPORT, "work/a.safetensors"), {"a.safetensors": MINE}),
    ((*EXPORT, "work/peft", "--format", "peft"), {"peft/a.txt": MINE}),
    ((*EXPORT, "work/peft", "--format", "peft", "--overwrite"), {"peft/a.txt": MINE}),
    ((*EXPORT, "work/peft", "--format", "peft", "--overwrite"),
     {"peft/adapter_config.json": b"{}", "peft/notes.txt": MINE}),
    ((*EXPORT, "work/merged", "--format", "merged", "--overwrite"), {"merged/vae/a": MINE}),
    (("demo", "--output-dir", "work"), {"videos/metadata.csv": MINE}),
    (("demo", "--output-dir", "work"), {"report.html": MINE}),
    (("demo", "--output-dir", "work"), {"run/config.toml": MINE}),
]  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch, micro_home) -> Path:
    """Videos, manifests, a cache and a run, in the working directory."""
    monkeypatch.chdir(Path(shutil.copytree(FIXTURE, tmp_path / "project")))
    return tmp_path / "project"


def _bytes(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


def _write(folder: Path, work: dict[str, bytes]) -> None:
    for name, data in work.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _run(*words: str) -> int:
    result = cli.invoke(*words)
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    return result.exit_code


def test_every_command_that_writes_files_is_tried():
    assert {words[0] for words, _ in CASES} >= COMMANDS.keys() - WRITE_NO_FILES


@pytest.mark.parametrize(
    ("words", "work"), CASES, ids=[f"{w[0]} {next(iter(f))}" for w, f in CASES]
)
def test_no_byte_of_somebodys_work_changes(project, words, work):
    _write(project / "work", work)
    before = _bytes(project)
    _run(*words)
    after = _bytes(project)
    assert {name: after.get(name) for name in before} == before


def test_a_finished_run_keeps_edits_of_its_card_and_settings_when_it_is_resumed(project):
    run = project / "run"
    config = (run / "config.toml").read_bytes() + b"# the good one\n"
    _write(run, {"README.md": MINE, "notes.txt": MINE, "config.toml": config})
    before = _bytes(run)
    assert _run("train", "--output-dir", "run") == 1
    assert _bytes(run) == before
    assert _run("train", "--output-dir", "run", "--resume") == 0
    after = _bytes(run)
    kept = ("README.md", "notes.txt", run_folder.ADAPTER_NAME)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    # Measured again, with other settings than those of 0.1.0: the earlier best is put aside.
    best = before[f"best/{run_folder.ADAPTER_NAME}"]
    assert after[f"best-before-step-000002/{run_folder.ADAPTER_NAME}"] == best
    assert b"max_steps = 2" in after["config.toml"]


def test_a_page_is_replaced_by_the_same_command_only(tmp_path):
    path = tmp_path / "a.html"
    require_own_page(path, "verify", flag="--html")
    files.write_text(path, marked(page("é", ["\udcff"]), "verify"))
    require_own_page(path, "verify", flag="--html")
    require_own_page(None, "verify", flag="--html")


def test_a_new_file_goes_beside_those_that_are_there(tmp_path):
    assert files.free_path(tmp_path / "a.mp4").name == "a.mp4"
    _write(tmp_path, {"a.mp4": MINE, "a-2.mp4": MINE})
    assert files.free_path(tmp_path / "a.mp4").name == "a-3.mp4"


def test_a_materialized_clip_that_a_person_changed_is_not_replaced(project):
    words = (*PREPARE, "--materialize", "npz")
    assert _run(*words) == 0
    clip = next((project / "work" / "clips").glob("*.npz"))
    clip.write_bytes(MINE)
    assert _run(*words) == 3
    assert clip.read_bytes() == MINE
