"""The import contracts of pyproject.toml name every module that exists."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "stages" / "wanlora"


def modules(folder: Path) -> set[str]:
    return {
        path.stem
        for path in folder.iterdir()
        if not path.name.startswith("_") and (path.is_dir() or path.suffix == ".py")
    }


def contracts():
    text = (ROOT / "pyproject.toml").read_text()
    return tomllib.loads(text)["tool"]["importlinter"]["contracts"]


def contract(start: str):
    return next(each for each in contracts() if each["name"].startswith(start))


def test_the_layers_are_the_modules_of_the_package():
    layers = contract("layers")["layers"]
    assert {name for layer in layers for name in layer.split(" | ")} == modules(PACKAGE)
    assert len(modules(PACKAGE)) <= 20


def test_the_commands_of_the_contract_are_those_of_the_package():
    named = {name.rpartition(".")[2] for name in contract("no command")["modules"]}
    assert named == modules(PACKAGE / "commands")


def test_a_library_belongs_to_the_folders_that_a_contract_leaves_out_and_to_no_other():
    owners = {"only wan/ and adapters/": {"wan", "adapters"}, "only store/": {"store"},
              "only media/": {"media"}}  # fmt: skip
    for start, own in owners.items():
        named = {name.rpartition(".")[2] for name in contract(start)["source_modules"]}
        assert named == modules(PACKAGE) - own


COMPOSING = {
    "commands/cache_latents/encode_settings.py", "commands/cache_latents/preflight.py",
    "commands/estimate/setup.py", "commands/evaluate/preflight.py", "commands/evaluate/setup.py",
    "commands/export/preflight.py",
    "commands/sample/preflight.py", "commands/sample/setup.py", "commands/train/opening.py",
    "commands/train/preflight.py",
}  # fmt: skip
"""Modules beside a command's `run` that read its settings: its checks, and one that composes."""

NOT_YET = {"commands/train/opening_data.py", "commands/train/opening_model.py"}
"""Modules that still have to take plain values."""


def reads_settings(tree: ast.Module) -> bool:
    """Whether a module imports the settings of a command, or names them in a signature."""
    names = [
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("wanlora.config") for alias in node.names
    ]  # fmt: skip
    names += [
        ast.unparse(node.annotation) for node in ast.walk(tree)
        if isinstance(node, ast.arg) and node.annotation
    ]  # fmt: skip
    return any(re.search(r"\b[A-Z]\w*Config\b", name) for name in names)


def test_settings_are_read_by_run_its_checks_and_one_composing_module_of_a_command():
    """Every other function takes plain values."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        tree = ast.parse(path.read_text())
        has_run = any(
            isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body
        )
        if place.parts[0] not in ("config", "options.py", "cli.py") and not has_run:
            found |= {place.as_posix()} if reads_settings(tree) else set()
    assert found == COMPOSING | NOT_YET
