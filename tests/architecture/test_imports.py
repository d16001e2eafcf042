"""The import contracts of pyproject.toml name every module that exists."""

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
