"""The proof on a GPU: its phases are apart, its files are complete at any moment."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"

SMALL = """
import sys
sys.path.insert(0, {bench!r})
import gpu_proof
from gpu_proof import Phase
from pathlib import Path
gpu_proof.BENCH = Path({folder!r})
gpu_proof.PHASES.clear()
gpu_proof.PHASES.update({phases})
gpu_proof.SHOWN = dict.fromkeys(gpu_proof.PHASES, gpu_proof.rows_of)
sys.exit(gpu_proof.main())
"""
GOOD = """
import json, sys, time
output = sys.argv[sys.argv.index("--output") + 1]
open(output, "w").write(json.dumps({"found": 1.5, "machine": {"gpu": "NVIDIA H100 80GB"}}))
"""
BAD = "raise RuntimeError('CUDA error: an illegal memory access')"
SEGMENTATION_FAULT = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
SLOW = GOOD + "open(output + '.here', 'w').close(); time.sleep(600)"


def command(folder: Path, *options: object, **scripts: str) -> list[str]:
    """A proof whose phases are these scripts: the program around them is the real one."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / f"{name}.py").write_text(script)
    phases = "{" + ", ".join(f"{name!r}: Phase('{name}.py', 10)" for name in scripts) + "}"
    program = SMALL.format(bench=str(BENCH), folder=str(folder), phases=phases)
    return [
        sys.executable, "-c", program, "--tiny", "--output", str(folder / "out"),
        *map(str, options), "--phases", *scripts,
    ]  # fmt: skip


def document(folder: Path) -> dict:
    return json.loads((folder / "out" / "gpu_proof.json").read_text())


def test_a_phase_that_ends_badly_is_recorded_and_the_others_run(tmp_path):
    folder = tmp_path / "proof"
    scripts = {"one": GOOD, "two": BAD, "three": SEGMENTATION_FAULT, "four": GOOD}
    words = command(folder, **scripts)
    words[words.index("--output") + 1] = "proof/out"
    (folder / "out").mkdir()
    (folder / "out" / "two.json").write_text('{"found": "by an earlier run"}')
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    phases = document(folder)["phases"]
    assert {name: phase["state"] for name, phase in phases.items()} == {
        "one": "finished", "two": "failed", "three": "failed", "four": "finished",
    }  # fmt: skip
    assert "CUDA error" in phases["two"]["error"]
    assert phases["two"]["results"] == {}
    assert "SIGSEGV" in phases["three"]["error"]
    assert phases["four"]["results"]["found"] == 1.5
    page = (folder / "out" / "gpu_proof.md").read_text()
    assert "NVIDIA H100 80GB" in page
    assert "| two | failed |" in page


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_in_the_third_phase_leaves_the_first_two(tmp_path, sent):
    folder = tmp_path / "proof"
    scripts = {"one": GOOD, "two": BAD, "three": SLOW, "four": GOOD}
    process = subprocess.Popen(command(folder, **scripts), stdout=subprocess.DEVNULL)
    slow = folder / "out" / "three.json.here"
    while not slow.exists():
        assert process.poll() is None
        time.sleep(0.02)
    while document(folder)["phases"].get("three", {}).get("results", {}) == {}:
        time.sleep(0.02)
    process.send_signal(sent)
    code = process.wait(60)
    found = document(folder)
    states = {name: phase["state"] for name, phase in found["phases"].items()}
    assert states["one"] == "finished"
    assert states["two"] == "failed"
    assert found["phases"]["three"]["results"]["found"] == 1.5
    if sent == signal.SIGTERM:
        assert (code, states["three"]) == (143, "stopped")
    else:
        assert (code, states["three"]) == (-9, "running")
    assert "four" not in states


def test_a_phase_gets_its_share_and_keeps_what_it_measured(tmp_path):
    folder = tmp_path / "proof"
    done = subprocess.run(
        command(folder, "--seconds", 3, one=SLOW, two=GOOD), capture_output=True, text=True
    )
    assert done.returncode == 1
    phases = document(folder)["phases"]
    assert phases["one"]["state"] == "out of time"
    assert phases["one"]["limit_s"] == pytest.approx(1.5, abs=0.5)
    assert phases["one"]["results"]["found"] == 1.5
    assert "two" in phases


def write_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return folder / name


def test_wheels_are_imported_from_a_folder(tmp_path):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = tmp_path / "wheels"
    write_wheel(wheels, "small_one-1.2-py3-none-any.whl", {"small_one/__init__.py": "VALUE = 7"})
    write_wheel(
        wheels, f"other-3.0-{tag}-abi3-linux_{os.uname().machine}.whl",
        {"other-3.0.data/purelib/other.py": "VALUE = 8", "other-3.0.dist-info/METADATA": ""},
    )  # fmt: skip
    folder = tmp_path / "proof"
    phase = GOOD.replace("1.5", "small_one.VALUE + other.VALUE").replace(
        "import json", "import small_one, other, json"
    )
    done = subprocess.run(
        command(folder, "--wheels", wheels, one=phase), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert document(folder)["phases"]["one"]["results"]["found"] == 15


@pytest.mark.parametrize(
    ("name", "files", "named"),
    [
        (None, {}, "bench/wheels.py"),
        ("a-1.0-cp39-cp39-win_amd64.whl", {"a.py": ""}, "--python"),
        ("a-1.0-py3-none-any.whl", {"../a.py": ""}, "../a.py"),
        ("a.whl", {"a.py": ""}, "a.whl"),
    ],
)
def test_wheels_that_cannot_be_used_are_refused(tmp_path, name, files, named):
    unpack = runpy.run_path(str(BENCH / "wheels.py"))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    if name:
        write_wheel(wheels, name, files)
    with pytest.raises(unpack["WheelError"]) as refused:
        unpack["unpack"](wheels, tmp_path / "site")
    assert named in str(refused.value)


def test_two_versions_of_a_package_and_a_damaged_wheel_are_refused(tmp_path):
    unpack = runpy.run_path(str(BENCH / "wheels.py"))
    wheels = tmp_path / "wheels"
    for version in ("1.0", "2.0"):
        write_wheel(wheels, f"a-{version}-py3-none-any.whl", {"a.py": ""})
    with pytest.raises(unpack["WheelError"], match=r"1\.0 .* 2\.0"):
        unpack["unpack"](wheels, tmp_path / "site")
    (wheels / "a-2.0-py3-none-any.whl").unlink()
    (wheels / "a-1.0-py3-none-any.whl").write_bytes(b"PK")
    with pytest.raises(unpack["WheelError"], match=r"a-1\.0"):
        unpack["unpack"](wheels, tmp_path / "site")


def test_goals_are_reached_or_missed_by_their_numbers():
    goals = runpy.run_path(str(BENCH / "goals.py"))
    rows = [
        {"variant": "none", "seconds": 1.65, "mfu": 0.53, "peak_gb": 76.0, "seed takes": 2.8},
        {"variant": "selective", "seconds": 1.96, "peak_gb": 17.0},
        {"variant": "naive", "error": "not measured"},
    ]
    phases = {"step": {"results": {"cases": [{"geometry": "81x480x832", "rows": rows}]}}}
    reached = {row["goal"]: row["verdict"] for row in goals["verdicts"](phases)}
    assert list(reached.values()) == [
        "target", "target", "missed", "target", "missed", "must",
        *["not measured"] * 6,
    ]  # fmt: skip


def test_the_goals_in_the_docs_are_those_of_the_benchmark():
    goals = runpy.run_path(str(BENCH / "goals.py"))
    table = goals["table"](goals["verdicts"](goals["predictions"]()), "predicted")
    page = (BENCH.parent / "docs" / "benchmarks.md").read_text()
    assert table in page, f"python bench/goals.py prints:\n{table}"


TOGETHER = """
import importlib, sys
from pathlib import Path
sys.path.insert(0, {bench!r})
import gpu_proof
folder = Path({folder!r})
proof = gpu_proof.Proof(folder, {{"tiny": True, "started": "now", "limit_s": 0}})
for name, phase in gpu_proof.PHASES.items():
    output = folder / f"{{name}}.json"
    given = [word.format(rates=folder / "rates.json") for word in phase.tiny_arguments]
    sys.argv = [phase.script, "--output", str(output), "--tiny", *given]
    importlib.import_module(phase.script.removesuffix(".py")).main()
    proof.phases[name] = dict(state="finished", seconds=0, limit_s=0, error=None, results={{}})
    proof._read(output, proof.phases[name])
proof.write()
"""


def test_every_phase_runs_on_a_cpu(tmp_path):
    """In one process, which imports torch once; the tests above are of the processes."""
    program = TOGETHER.format(bench=str(BENCH), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=580,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (BENCH.parent, *sys.path)))},
        cwd=BENCH.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_proof.json").read_text())
    results = {name: phase["results"] for name, phase in found["phases"].items()}
    rates = results["rates"]["attention 17x64x64"]
    assert rates["flash"]["backward_tflops"] > 0
    assert "error" in rates["cudnn"]
    assert results["rates"]["floor_s 17x64x64"] > 0
    assert results["correctness"]["passed"] > 0
    assert results["correctness"]["failed"] == 0
    rows = {row["variant"]: row for row in results["step"]["cases"][0]["rows"]}
    assert rows["auto"]["same_as"] == "none"
    assert rows["fullckpt_cudnn"]["gradient_cosine"] > 0.9999
    assert results["encoders"]["wait npz"]["clips"] == 2
    assert results["large"]["step of t2v-14b"]["blocks"] == 40
    streamed = results["streaming"]["step 81x480x832"]["rows"]
    assert [row["variant"] for row in streamed] == [
        "resident", "streamed", "swapped", "offload", "int8", "streamed int8",
    ]  # fmt: skip
    assert all(row["same_loss"] and row["gradient_cosine"] > 1 - 1e-9 for row in streamed)
    assert {row["verdict"] for row in found["goals"]} == {"not measured"}
    page = (tmp_path / "gpu_proof.md").read_text()
    assert all(f"## {name}" in page for name in results)


def test_without_a_gpu_the_real_sizes_are_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu_proof.py"), "--output", str(tmp_path)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "--tiny" in done.stderr
