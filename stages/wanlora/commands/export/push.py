"""Upload a run's adapter to the Hugging Face Hub.

Owns: the files of the repository: the adapter, the card and the newest pictures, without paths of
this machine.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from wanlora.commands.export import export, preflight
from wanlora.commands.export.export_result import ExportResult
from wanlora.config import ExportConfig
from wanlora.files import staging, write_text
from wanlora.runs.run_folder import ADAPTER_NAME, CARD_NAME, newest_pictures
from wanlora.wan import hub
from wanlora.wan.model_folder import public_name


def run(config: ExportConfig) -> ExportResult:
    """Upload a run's adapter, card and newest pictures, and nothing else of its folder.

    Raises:
        OutputError: The hub refuses the upload.
    """
    assert config.push is not None
    run_dir = preflight.run_folder(config)
    with staging(run_dir / "push") as folder:
        settings = config.model_copy(update={"output": folder / ADAPTER_NAME, "push": None})
        (source,) = preflight.check(settings)
        (result,) = export.convert(
            [replace(source, output=folder / ADAPTER_NAME)],
            to_format=config.format, dtype=config.dtype,
        )  # fmt: skip
        model = source.header.provenance.get("model", "")
        write_text(folder / CARD_NAME, _public_card(run_dir, model, config.push))
        for picture in newest_pictures(run_dir):
            target = folder / picture.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, target)
        address = hub.upload(folder, config.push, private=config.private)
    return replace(result, output=address)


def _public_card(run_dir: Path, model: str, repository: str) -> str:
    """Return a run's card with the repository's name and without paths of this machine."""
    card = (run_dir / CARD_NAME).read_text(encoding="utf-8")
    card = card.replace('"FOLDER"', f'"{repository}"').replace(str(run_dir.absolute()), "FOLDER")
    return card.replace(model, public_name(model)) if Path(model).is_absolute() else card
