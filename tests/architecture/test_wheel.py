"""The wheel has the package with its weights and page assets; the source archive has the rest."""

from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "stages" / "wanlora"


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    """Files of the wheel, without its own metadata."""
    builder = WheelBuilder(str(ROOT))
    (path,) = builder.build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    with ZipFile(path) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_is_the_package_folder(names):
    files = {
        f"wanlora/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == files


def test_the_wheel_has_the_embedded_model_and_the_type_marker(names):
    weights = {name for name in names if name.startswith("wanlora/micro/weights/")}
    for part in ("vae", "text_encoder", "transformer"):
        assert any(name.split("/")[3:4] == [part] and name.endswith(".safetensors")
                   for name in weights), part  # fmt: skip
    assert {f"wanlora/micro/weights/{name}" for name in (
        "README.md", "model_index.json", "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    )} <= weights  # fmt: skip
    assert "wanlora/py.typed" in names


def test_the_wheel_has_the_style_sheets_and_scripts_of_the_pages(names):
    assets = {name.rpartition("/")[2] for name in names if "/report/assets/" in name}
    assert {"page.css", "sort.js"} <= assets


def test_the_wheel_has_no_code_that_trains_the_embedded_model(names):
    trained_by = {path.name for path in (ROOT / "tools" / "micro").glob("[!_]*.py")}
    assert "pretrain.py" in trained_by
    in_wheel = {name.split("/")[-1] for name in names if name.startswith("wanlora/micro/")}
    assert not trained_by & in_wheel


def test_the_source_distribution_has_the_documents_that_its_tests_read():
    builder = SdistBuilder(str(ROOT))
    names = {file.distribution_path for file in builder.recurse_included_files()}
    assert {"README.md", "CONTRIBUTING.md", "mkdocs.yml", "docs/architecture.md"} <= names
    assert "tools/micro/pretrain.py" in names
