"""Tables and JSON for the scripts of this folder."""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

Section = Callable[..., list[dict]]


def table(rows: list[dict]) -> str:
    def shown(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(shown(r[h]) for h in head) + " |" for r in rows])


class Results:
    """Figures in a JSON file that is complete after each of them: a cut-off loses no earlier one.

    Args:
        path: The file; None to keep the figures in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.values: dict = {}

    def note(self, **values: object) -> None:
        """Add figures, and write the file."""
        self.values |= values
        self.write()

    def attempt(self, name: str, action: Callable[[], object]) -> None:
        """Add the result of an action, or its error: the figures after it are still measured."""
        try:
            value = action()
        except Exception as error:  # noqa: BLE001
            value = {"error": reason_of(error)}
        print(f"{name}: {value}", flush=True)
        self.note(**{name: value})

    def write(self) -> None:
        """Replace the file."""
        if self.path:
            write_json(self.path, self.values)


def write_json(path: Path, value: object) -> None:
    """Write a file that is either the old one or the new one, at any moment."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def reason_of(error: BaseException) -> str:
    """Class of an error and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Clock:
    """The time that a script has."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()


def phase_options(about: str) -> argparse.ArgumentParser:
    """Make the options that `gpu_proof.py` passes to each of its phases."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON, after each of them")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="start no figure after this time"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models: figures without meaning")
    return parser


def main(about: str, sections: dict[str, Section]) -> None:
    """Run the sections that were named, or all; print tables, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=", ".join(sections))
    parser.add_argument("--tiny", action="store_true", help="a run of seconds")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    figures: dict[str, object] = {"machine": machine}
    with tempfile.TemporaryDirectory(prefix="wanlora-bench-") as root:
        for name in options.sections or sections:
            rows = sections[name](Path(root), tiny=options.tiny)
            figures[name] = rows
            print(f"\n{name}: {(sections[name].__doc__ or '').splitlines()[0]}\n{table(rows)}")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1))
