"""Numbers and lists for people: durations, sizes, counts, rates, shares, "and N more".

Owns: units and rounding of everything that a command prints. Sizes are in powers of 1000, as in
data sheets of disks and GPUs: 1 GB = 10^9 bytes. Must not know: what is counted.
"""

from collections.abc import Iterable, Mapping, Sequence

FIRST = 5
"""Maximum number of lines of a list on a terminal."""
JSON = "the output of --json"

_DURATIONS = (("days", 86_400, 2), ("h", 3600, 2), ("min", 60, 2))
"""Unit, its seconds, and the minimum number of units for which it is used."""


def duration(seconds: float) -> str:
    """Format a duration >= 0 in seconds: `35 ms`, `1.52 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for unit, length, least in _DURATIONS:
        if seconds >= least * length:
            value = seconds / length
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"
    if seconds >= 10:
        return f"{seconds:.0f} s"
    if seconds >= 0.1:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{1000 * seconds:.0f} ms"
    return "under 1 ms" if seconds > 0 else "0 s"


def size(num_bytes: float) -> str:
    """Format a number of bytes >= 0: `840 B`, `83.2 kB`, `4.81 MB`, `25.4 GB`."""
    if num_bytes < 999.5:
        return f"{num_bytes:.0f} B"
    return _scaled(num_bytes, "k", "M", "G", "T", "P") + "B"


def count(number: int, noun: str, plural: str = "") -> str:
    """Count things: `1 clip`, `1,234 clips`.

    Args:
        number: Number of things, >= 0.
        noun: Name of one.
        plural: Name of several, if it is not the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def tally(numbers: Mapping[str, int]) -> str:
    """Join names and their numbers on one line: `missing 2, too_short 1`."""
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def number(value: float) -> str:
    """Format a large number >= 0: `512`, `492 k`, `23.6 M`, `1.32 B`."""
    return f"{value:.0f}" if value < 999.5 else _scaled(value, "k", "M", "B", "T")


def flops(value: float, unit: str = "FLOP") -> str:
    """Format operations, or with `FLOP/s` a rate of them: `41.2 MFLOP`, `870 TFLOP`."""
    return _scaled(value, "M", "G", "T", "P", "E", first=1e6) + unit


def percent(share: float) -> str:
    """Format a share of 1: `0.4 %`, `16 %`."""
    value = 100 * share
    return f"{value:.1f} %" if 0 < abs(value) < 9.95 else f"{value:.0f} %"


def first(items: Sequence[str], where: str, *, most: int = FIRST, indent: str = "  ") -> list[str]:
    """Return the first items as lines, and a line with the number of others.

    Args:
        items: All of them.
        where: Location of the complete list, for example a file or `--json`.
        most: Number of lines before that one.
        indent: Start of each line.
    """
    rest = len(items) - most
    more = [f"{indent}and {rest:,} more in {where}"] if rest > 0 else []
    return [*(f"{indent}{item}" for item in items[:most]), *more]


def names(items: Iterable[object], *, most: int = 3, separator: str = ", ") -> str:
    """Join the first items on one line: `a, b, c and 4 more`."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def _scaled(value: float, *prefixes: str, first: float = 1e3) -> str:
    """Write three figures with the prefix of a power of 1000, starting at that of `first`."""
    scaled = value / first
    for prefix in prefixes[:-1]:
        if scaled < 999.5:
            return f"{scaled:.3g} {prefix}"
        scaled /= 1000
    return f"{scaled:.3g} {prefixes[-1]}"
