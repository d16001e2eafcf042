"""Check wanlora's claims of speed and correctness on this GPU: `python bench/gpu_proof.py`.

    make gpu-proof
    python bench/gpu_proof.py --wheels wheels/ --output proof/ --seconds 540
    python bench/gpu_proof.py --tiny                      # on a CPU: figures without meaning

Phases, each in a process of its own and with a share of the time; what one leaves goes to those
after it:

    rates        attention kernels, matrix product, copy, and the floor of this box  (rates.py)
    correctness  the tests of tests/gpu  (correctness.py)
    step         a training step in our modes, beside four baselines  (step.py)
    encoders     VAE and UMT5 of stage one, and their wait for clips  (encoders.py)
    large        a step of 14B from some of its blocks; a denoising step  (large_model.py)
    streaming    blocks of 14B in host memory, beside resident ones  (streaming.py)

Nothing is downloaded: the models have the real sizes and random weights. `gpu_proof.json` and
`gpu_proof.md` in the output folder are written after each figure, so a run that is cut off leaves
what it measured. An error ends its phase only. Exit code 0: every phase finished without an error.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import figures
import goals

BENCH = Path(__file__).parent
ROOT = BENCH.parent
POLL_S = 0.2
GRACE_S = 3.0
"""Seconds between asking a phase to end and ending it."""
OWN_END_S = 2.0
"""Seconds before its limit at which a phase starts no further figure."""


@dataclass(frozen=True)
class Phase:
    """A script that measures something.

    Attributes:
        script: File in this folder; takes `--output`, `--seconds` and `--tiny`.
        share_s: Seconds of 540 that it gets.
        arguments: More arguments.
        tiny_arguments: Arguments instead, for a tiny run.
    """

    script: str
    share_s: float
    arguments: tuple[str, ...] = ()
    tiny_arguments: tuple[str, ...] = ()


PHASES = {
    "rates": Phase("rates.py", 20),
    "correctness": Phase("correctness.py", 120, (), ("--only", "upload or kernel")),
    "step": Phase(
        "step.py", 230,
        (
            "--geometry", goals.LARGE, "--geometry", goals.SMALL, "--baseline-steps", "3",
            "--rates", "{rates}", "--variants",
            "none", "fullckpt_cudnn", "selective", "fullckpt", "seed", "naive", "auto",
        ),
        (
            "--warmup", "2", "--steps", "1", "--rates", "{rates}", "--variants",
            "none", "fullckpt_cudnn", "auto",
        ),
    ),
    "encoders": Phase("encoders.py", 50),
    "large": Phase("large_model.py", 40),
    "streaming": Phase("streaming.py", 80),
}  # fmt: skip


@dataclass
class Proof:
    """A run: its phases so far, and the two files that show them.

    Attributes:
        folder: Folder of the files.
        facts: What holds for the whole run.
        phases: Results, by name.
    """

    folder: Path
    facts: dict
    phases: dict[str, dict] = field(default_factory=dict)

    def write(self) -> None:
        """Write both files; either is complete at any moment."""
        rows = goals.verdicts({} if self.facts["tiny"] else self.phases)
        document = self.facts | {"machine": self.machine(), "phases": self.phases, "goals": rows}
        figures.write_json(self.folder / "gpu_proof.json", document)
        part = self.folder / "gpu_proof.md.part"
        part.write_text(markdown(document))
        part.replace(self.folder / "gpu_proof.md")

    def machine(self) -> dict:
        """The machine as the first phase that started saw it."""
        seen = ((phase.get("results") or {}).get("machine") for phase in self.phases.values())
        return next(filter(None, seen), {"python": platform.python_version()})

    def run(self, name: str, seconds: float, environment: dict[str, str], *, tiny: bool) -> None:
        """Run a phase, and write its figures whenever there are new ones.

        Args:
            name: Key of `PHASES`.
            seconds: Its time; then it is ended.
            environment: Variables of its process.
            tiny: Run it with tiny models.
        """
        phase, output = PHASES[name], self.folder / f"{name}.json"
        given = phase.tiny_arguments if tiny and phase.tiny_arguments else phase.arguments
        command = [
            sys.executable, str(BENCH / phase.script), "--output", str(output),
            "--seconds", f"{max(0.0, seconds - OWN_END_S):.0f}", *(["--tiny"] if tiny else []),
            *(word.format(rates=self.folder / "rates.json") for word in given),
        ]  # fmt: skip
        record = self.phases[name] = {
            "state": "running", "limit_s": seconds, "seconds": 0.0, "error": None, "results": {},
        }  # fmt: skip
        started, log = time.monotonic(), self.folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._follow(process, record, output, started)
        finally:
            end(process)
            self._read(output, record)
            record["seconds"] = time.monotonic() - started
            if record["state"] == "running":
                record["state"], record["error"] = "stopped", "the proof was stopped"
            self.write()
        if record["state"] == "failed":
            record["error"] = f"{record['error']}; the end of {log.name}: {last_line(log)}"
            self.write()

    def _follow(
        self, process: subprocess.Popen, record: dict, output: Path, started: float
    ) -> None:
        while process.poll() is None:
            record["seconds"] = time.monotonic() - started
            if record["seconds"] > record["limit_s"]:
                record["state"], record["error"] = "out of time", "ended by its limit"
                return
            if self._read(output, record):
                self.write()
            time.sleep(POLL_S)
        code = process.returncode
        record["state"] = "failed" if code else "finished"
        if code:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            record["error"] = f"ended with {name}"

    @staticmethod
    def _read(output: Path, record: dict) -> bool:
        """Take over a phase's figures; return True if they are new."""
        try:
            results = json.loads(output.read_text())
        except (OSError, json.JSONDecodeError):
            return False
        changed = results != record["results"]
        record["results"] = results
        return changed


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        os.killpg(process.pid, sent)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError):  # what it started and left behind
        os.killpg(process.pid, signal.SIGKILL)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(empty)"


def markdown(document: dict) -> str:
    """Write a run as a page: the machine, the goals, and each phase's figures."""
    machine = document["machine"]
    where = machine.get("gpu", "a CPU")
    parts = [
        f"# Proof on {where}",
        f"{document['started']}, limit {document['limit_s']:.0f} s. "
        + ", ".join(f"{name} {value}" for name, value in machine.items() if name != "gpu"),
    ]
    if document["tiny"]:
        parts.append("**Tiny models: the figures mean nothing.**")
    elif "H100" not in where:
        parts.append("The goals are those of one H100 80 GB.")
    parts += ["## Goals", goals.table(document["goals"]), "## Phases"]
    lines = ["| phase | state | seconds | of | error |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {phase['state']} | {phase['seconds']:.0f} | {phase['limit_s']:.0f} | "
        f"{cell(phase['error'] or '')} |"
        for name, phase in document["phases"].items()
    ]
    parts.append("\n".join(lines))
    for name, phase in document["phases"].items():
        if phase["results"]:
            parts += [f"## {name}", SHOWN[name](phase["results"])]
    return "\n\n".join(parts) + "\n"


def cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def rows_of(results: dict) -> str:
    """Figures by name: a number, or the values of a measurement."""
    lines = ["| figure | value |", "|---|---|"]
    for name, value in results.items():
        if name in ("machine", "tiny", "geometry"):
            continue
        lines.append(f"| {name} | {cell(figure(value))} |")
    return "\n".join(lines)


def figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {figure(each)}" for name, each in value.items() if not isinstance(each, list)
        )
    return str(value)


def rates_shown(results: dict) -> str:
    rows = [
        f"| {name.removeprefix('attention ')} | {kernel} | {figure(rate)} |"
        for name, rates in results.items()
        if name.startswith("attention ") and "error" not in rates
        for kernel, rate in rates.items()
        if "error" not in rate
    ]
    rest = {name: value for name, value in results.items() if not name.startswith("attention ")}
    head = "| length of | kernel | TFLOP/s |\n|---|---|---|"
    missing = sorted(
        f"{kernel}: {rate['error']}"
        for name, rates in results.items()
        if name.startswith("attention ") and "error" not in rates
        for kernel, rate in rates.items()
        if "error" in rate
    )
    return "\n\n".join(
        [rows_of(rest), "\n".join([head, *rows]), *(cell(each) for each in dict.fromkeys(missing))]
    )


def correctness_shown(results: dict) -> str:
    counts = ", ".join(f"{results.get(name, 0)} {name}" for name in ("passed", "failed", "skipped"))
    lines = [f"{counts}, of {results.get('collected', '?')} tests."]
    for name, test in results.get("tests", {}).items():
        if test["outcome"] != "passed":
            reason = test.get("reason", "").strip().splitlines()
            lines.append(f"- {test['outcome']}: `{name}`: {reason[-1] if reason else ''}")
    return "\n".join(lines)


def step_shown(results: dict) -> str:
    parts = []
    for case in results["cases"]:
        floor = f"{case['floor_s']:.3g} s" if case["floor_s"] else "unknown"
        parts.append(
            f"{case['geometry']}, {case['tokens']:,} tokens, LoRA on {case['targets']}: "
            f"{case['tflop']:.4g} TFLOP, floor {floor}; our attention: {case['kernel']}"
        )
        lines = [
            "| variant | blocks | s/step | range | first step, s | peak, GB | MFU, % | of floor | "
            "loss | gradient's cosine |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in case["rows"]:
            if "seconds" not in row:
                lines.append(f"| {row['variant']} | {cell(row['error'])} |" + " |" * 8)
                continue
            values = (
                row["seconds"], None, row["first_step_s"], row["peak_gb"],
                row["mfu"] and 100 * row["mfu"], row["to_floor"], row["loss"],
                row.get("gradient_cosine"),
            )  # fmt: skip
            shown = ["–" if value is None else f"{value:.4g}" for value in values]
            shown[1] = f"{row['min']:.3g}–{row['max']:.3g}"
            same = f" (as {row['same_as']})" if "same_as" in row else ""
            name = f"{row['variant']}{same}"
            lines.append(f"| {name} | {row['blocks']} | {' | '.join(shown)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def streaming_shown(results: dict) -> str:
    parts = [rows_of({name: results.get(name) for name in ("copy_gb_s",)})]
    if isinstance(results.get("counted"), list):
        parts += ["Predicted for all blocks:", figures.table(results["counted"])]
    for name, found in results.items():
        if name.startswith("step "):
            parts.append(f"{name}: {cell(found.get('error') or found['kernel'])}")
            rows = [row for row in found.get("rows", []) if "seconds" in row]
            shown = ("variant", "seconds", "peak_gb", "same_loss", "gradient_cosine")
            if rows:
                parts.append(figures.table([{key: row[key] for key in shown} for row in rows]))
    return "\n\n".join(parts)


SHOWN = {
    "rates": rates_shown,
    "correctness": correctness_shown,
    "step": step_shown,
    "encoders": rows_of,
    "large": rows_of,
    "streaming": streaming_shown,
}


def environment_of(temporary: Path, wheels: Path | None) -> dict[str, str]:
    """Variables for the phases: where to import from, and caches that this run starts empty."""
    site = temporary / "site"
    site.mkdir()
    if wheels:
        from wheels import WheelError, unpack  # noqa: PLC0415  (needs packaging)

        try:
            print(f"from {wheels}: {', '.join(unpack(wheels, site))}", flush=True)
        except WheelError as error:
            sys.exit(str(error))
    paths = [ROOT / "stages", ROOT, site, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "WANLORA_CACHE_HOME": str(temporary / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(temporary / "inductor"),
    }


LOOK = """
import torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} finds no CUDA GPU here. To try the script: --tiny")
import json, rates
print(json.dumps(rates.machine()))
"""


def look_at_machine(environment: dict[str, str]) -> dict:
    """Import what the phases need, and find the GPU; ends the program if one is missing."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=BENCH, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        if "--tiny" not in reason:
            reason += (
                "\nInstall it (make setup), or give a folder of wheels: python bench/wheels.py "
                "wheels/, then --wheels wheels/"
            )
        sys.exit(reason)
    return json.loads(done.stdout.splitlines()[-1])


def run(
    proof: Proof,
    names: Sequence[str],
    environment: dict[str, str],
    clock: figures.Clock,
    *,
    tiny: bool,
) -> None:
    """Run phases one after the other; each gets its share of the time that is left."""
    for number, name in enumerate(names):
        shares = [PHASES[each].share_s for each in names[number:]]
        seconds = max(0.0, clock.left_s) * shares[0] / sum(shares)
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        proof.run(name, seconds, environment, tiny=tiny)
        phase = proof.phases[name]
        print(f"{name}: {phase['state']} after {phase['seconds']:.0f} s. {phase['error'] or ''}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels (see wheels.py): imported without pip"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "outputs" / "gpu-proof", help="folder of the results"
    )
    parser.add_argument("--seconds", type=float, default=540, help="time of all phases together")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--tiny", action="store_true", help="tiny models, also without a GPU")
    return parser.parse_args()


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.output = options.output.resolve()  # phases have another working folder
    options.output.mkdir(parents=True, exist_ok=True)
    for name in PHASES:  # an earlier run's rates may be of another machine
        (options.output / f"{name}.json").unlink(missing_ok=True)
    facts = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "limit_s": options.seconds,
        "tiny": options.tiny,
    }  # fmt: skip
    proof = Proof(options.output, facts)
    with tempfile.TemporaryDirectory(
        prefix="wanlora-proof-", ignore_cleanup_errors=True
    ) as temporary:
        environment = environment_of(Path(temporary), options.wheels)
        clock = figures.Clock(options.seconds)
        if not options.tiny:
            print(look_at_machine(environment), flush=True)
        proof.write()
        run(proof, options.phases, environment, clock, tiny=options.tiny)
    print((options.output / "gpu_proof.md").read_text())
    return int(any(phase["state"] != "finished" for phase in proof.phases.values()))


if __name__ == "__main__":
    sys.exit(main())
