"""Pythons and dependencies in pyproject.toml, constraints.txt and the documents agree."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_TORCH = re.compile(r"nvidia-|cuda-|triton$")
"""Packages whose release torch fixes itself."""


def _pythons() -> list[str]:
    """Versions of Python in the classifiers, in order."""
    prefix = "Programming Language :: Python :: 3."
    return [f"3.{name.removeprefix(prefix)}" for name in PROJECT["classifiers"] if prefix in name]


def _pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(pin) for name, pin in pins.items()}


def _tested() -> list[dict[str, str]]:
    """Rows of the table of tested versions in docs/faq.md."""
    section = (ROOT / "docs/faq.md").read_text().split("### Which versions are tested?")[1]
    head, _, *rows = re.findall(r"^\| (.*) \|$", section.split("\n#")[0], re.MULTILINE)
    names = head.split(" | ")
    return [dict(zip(names, row.split(" | "), strict=True)) for row in rows]


TESTED = _tested()
PACKAGES = [name for name in TESTED[0] if canonicalize_name(name) in _pins()]


def test_each_python_of_the_classifiers_was_tested_and_no_other():
    tested = {row["Python"].rpartition(".")[0] for row in TESTED}
    assert sorted(tested) == _pythons()
    assert PROJECT["requires-python"] == f">={_pythons()[0]}"
    assert f"Python {_pythons()[0]} to {_pythons()[-1]}" in (ROOT / "README.md").read_text()


def test_the_constraints_allow_each_dependency():
    pins = _pins()
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *extras["dev"], *extras["s3"], *extras["ray"]):
        needed = Requirement(text)
        pin = pins[canonicalize_name(needed.name)]
        assert needed.specifier.contains(pin), f"{text} and constraints.txt: {pin}"


def _installed_with(name: str, extra: str, seen: set[str]) -> set[str]:
    """Packages that this environment has for a package and an extra of it, itself included."""
    try:
        requirements = distribution(name).requires or []
    except PackageNotFoundError:  # for another system or Python
        return seen
    seen.add(name)
    for text in requirements:
        needed = Requirement(text)
        other = canonicalize_name(needed.name)
        if needed.marker and not needed.marker.evaluate({"extra": extra}):
            continue
        for wanted in needed.extras or {""}:
            if other not in seen or wanted:
                _installed_with(other, wanted, seen)
    return seen


def test_the_constraints_pin_everything_that_is_installed():
    """A package without a pin is another one tomorrow."""
    if any(
        Version(version(name)).release != _pins()[canonicalize_name(name)].release
        for name in PACKAGES
    ):
        pytest.skip("other versions are installed: make test-newest or make test-lowest")
    installed = _installed_with("wanlora", "dev", set()) - {"wanlora"}
    assert len(installed) > 100
    assert {name for name in installed if not OF_TORCH.match(name)} <= _pins().keys()


@pytest.mark.parametrize(
    "row", [row for row in TESTED if row["set"] == "constraints.txt"], ids=lambda row: row["Python"]
)
def test_the_table_of_tested_versions_has_the_pins(row):
    for name in PACKAGES:
        assert Version(row[name]) == _pins()[canonicalize_name(name)], name


def test_the_lowest_versions_of_the_table_are_the_declared_ones():
    (row,) = [row for row in TESTED if row["set"] == "lowest"]
    declared = [Requirement(text) for text in PROJECT["dependencies"]]
    bounds = {need.name: next(iter(need.specifier)).version for need in declared}
    for name in PACKAGES:
        tested, bound = Version(row[name]).release, Version(bounds[name]).release
        assert tested[: len(bound)] == bound, name
