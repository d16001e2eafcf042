"""The tests that need a GPU, with one line of JSON per test: `python bench/correctness.py`.

Runs tests/gpu in this process. Without a GPU: those of its tests that also run on a CPU.
"""

import sys
import time
from pathlib import Path

import figures

ROOT = Path(__file__).parents[1]
LAST = ("test_step.py", "test_commands.py")
"""Files that take the longest; the others run before them."""


def files() -> list[str]:
    folder = ROOT / "tests" / "gpu"
    first = sorted(path.name for path in folder.glob("test_*.py") if path.name not in LAST)
    return [str(folder / name) for name in (*first, *LAST)]


class Recorder:
    """A plugin of pytest that writes each test's outcome as it ends."""

    def __init__(self, results: figures.Results, clock: figures.Clock) -> None:
        self._results, self._clock = results, clock
        self._tests: dict[str, dict] = {}
        results.note(tests=self._tests, passed=0, failed=0, skipped=0)

    def pytest_runtest_protocol(self, item, nextitem):  # noqa: ARG002
        """Stop when the time is over: the tests after this one are counted as not run."""
        if self._clock.left_s < 0:
            item.session.shouldstop = "no time was left"

    def pytest_collection_finish(self, session):
        self._results.note(collected=len(session.items))

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.removeprefix("tests/gpu/")
        test = self._tests.setdefault(name, {"outcome": "passed", "seconds": 0.0})
        test["seconds"] += report.duration
        if report.outcome != "passed":
            test["outcome"] = report.outcome
            skipped = report.outcome == "skipped"
            test["reason"] = report.longrepr[2] if skipped else str(report.longrepr)[-2000:]
        outcomes = [each["outcome"] for each in self._tests.values()]
        counts = {name: outcomes.count(name) for name in ("passed", "failed", "skipped")}
        self._results.note(**counts)


def main() -> int:
    parser = figures.phase_options(__doc__)
    parser.add_argument("--only", default="", help="names of tests, as for pytest -k")
    options = parser.parse_args()
    results, clock = figures.Results(options.output), figures.Clock(options.seconds)
    started = time.perf_counter()
    import pytest  # noqa: PLC0415  (after the clock started)
    import torch  # noqa: PLC0415

    # Warnings do not fail these tests: the machine may have other releases of the libraries.
    cuda = torch.cuda.is_available()
    results.note(tiny=not cuda)
    marks = "gpu" if cuda else "not gpu and not slow"
    code = pytest.main(
        [*files(), "--rootdir", str(ROOT),
         "-c", str(ROOT / "pyproject.toml"), "-q", "-p", "no:cacheprovider", "-W", "default",
         "-m", marks, "-k", options.only],
        plugins=[Recorder(results, clock)],
    )  # fmt: skip
    results.note(exit_code=int(code), seconds=time.perf_counter() - started)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
