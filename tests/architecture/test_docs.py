"""The documents agree with the program."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from wanlora.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md")),
]  # fmt: skip


def test_generated_pages_are_what_make_docs_writes():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    made = generate["reference"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == made, "run: make docs"
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert page == generate["architecture"](page), "run: make docs"
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page == generate["performance"](page), "run: make docs"


def _commands():
    for document in DOCUMENTS:
        text = document.read_text()
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                launcher, launched, rest = line.strip().removeprefix("$ ").partition("-m wanlora ")
                words = f"wanlora {rest}" if launched else launcher
                if words.startswith("wanlora ") and "…" not in words:
                    yield pytest.param(words, id=f"{document.name}: {words[:50]}")


@pytest.mark.parametrize("line", list(_commands()))
def test_every_command_in_the_documents_has_flags_that_exist(line):
    _, name, *arguments = shlex.split(line, comments=True)
    group = typer.main.get_command(app)
    # Parsed, not run: an unknown flag or a missing argument raises.
    group.commands[name].make_context(name, arguments, **group.context_settings)


def _launches():
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        for found in re.findall(r"(?:accelerate launch|torchrun) .* -m wanlora .*", text):
            if "…" not in found:
                yield pytest.param(found, id=f"{document.name}: {found[:50]}")


@pytest.mark.parametrize("line", list(_launches()))
def test_every_launch_in_the_documents_has_flags_that_the_launcher_has(line):
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    words = shlex.split(line)
    accelerate = words[0] == "accelerate"
    parser = launch_command_parser() if accelerate else get_args_parser()
    given = parser.parse_args(words[2:] if accelerate else words[1:])
    assert (given.training_script, given.module) == ("wanlora", True)
    assert given.training_script_args[0] in ("train", "cache-latents")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def _anchors(document: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    kept = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_anchors_of_links_exist(document):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text()):
        page = document.parent / target if target else document
        if page.suffix == ".md":
            assert anchor in _anchors(page), f"{target}#{anchor}"


def test_every_name_on_the_map_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"## Map\n\n```\n(.*?)```", text, re.DOTALL).group(1)
    package = ROOT / "stages" / "wanlora"
    for line in block.splitlines():
        home = package if line.startswith("  ") else ROOT
        for name in re.findall(r"[\w./]+(?:\.py|/)(?=\s|$)", line):
            assert (home / name).exists(), name


def test_every_module_of_the_package_is_on_the_map():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "stages" / "wanlora").iterdir():
        if path.name.startswith(("_", "py.typed")):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert name in text, name


def test_every_path_of_where_to_change_what_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## Where to change what\n")[1].split("\n## ")[0]
    paths = [
        path for path in re.findall(r"`([\w./]+(?:\.py|/))`", section) if path != "stages/wanlora/"
    ]
    assert len(paths) > 25
    for path in paths:
        assert (ROOT / "stages" / "wanlora" / path).exists(), path


def test_the_readme_is_short_and_starts_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    shown = re.sub(r"<!--.*?-->", "", text)
    assert len(shown.split()) < 1200
    targets = re.findall(r"^make (\S+)", text, re.MULTILINE)
    assert targets == ["demo", "test"]


def test_the_memory_table_of_the_readme_is_what_estimate_counts():
    from wanlora.commands.estimate.estimate import run
    from wanlora.config import COMMANDS

    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| \d+ GB \((.+?)\) \| ([\d.]+) GB.*? \| ([\d.]+) GB", text, re.MULTILINE)
    assert len(rows) == 4
    for device, *counted in rows:
        for targets, peak in zip(("attention+ffn", "attention"), counted, strict=True):
            config = COMMANDS["estimate"].model_validate(
                {"device": device, "lora": {"targets": targets}}
            )
            assert float(peak) == pytest.approx(run(config).peak_gb, abs=0.06)
