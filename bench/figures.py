"""Tables and JSON for the scripts of this folder."""

import argparse
import json
import os
import platform
import tempfile
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
