"""`wanlora export`: an adapter as another tool's file, multiplied out into its base, or uploaded.

Owns: where an export appears and when. It is made in a hidden folder, read back by the library that
will read it, compared with the original module by module, and only then given its name. What is
given away has no path of this machine in it.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanlora import __version__
from wanlora.adapters.header import PROVENANCE_PREFIX, AdapterHeader, read_header
from wanlora.config import DEFAULT_MODEL, ExportConfig
from wanlora.core import units
from wanlora.errors import AdapterError, ConfigError, NonFiniteError, OutputError
from wanlora.files import (
    foreign_files,
    publish,
    publish_folder,
    require_folder,
    staging,
    write_json,
    write_text,
)
from wanlora.runs.run_folder import ADAPTER_NAME, CARD_NAME, adapter_of, preview_folders
from wanlora.wan import hub
from wanlora.wan.model_folder import PIPELINE, public_name, resolve, resolve_here
from wanlora.wan.weights import file_sha256

if TYPE_CHECKING:
    from wanlora.adapters.file import AdapterFile
    from wanlora.adapters.updates import Update

MERGED_RECORD = "wanlora.json"
MUCH_ROUNDING = 0.05
"""Part of an update that rounding may take from merged weights before it is worth a warning."""

# What a folder must hold to be taken for an earlier export, and replaced.
_MARKS = {"peft": "adapter_config.json", "merged": MERGED_RECORD}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written.

    Attributes:
        output: The file or folder; the repository's address after a push.
        format: Its format.
        adapter: What it was made from.
        source_format: That one's format.
        model: The base it was merged into; None for an adapter.
        dtype: Type of the numbers; None = the base's.
        modules: Adapted modules.
        bytes: Of the new weights on disk.
        max_relative_error: Of a module's update, as the reader loads it; 0 = the same numbers.
        read_by: The library that read it back.
    """

    output: str
    format: str
    adapter: str
    source_format: str
    model: str | None
    dtype: str | None
    modules: int
    bytes: int
    max_relative_error: float
    read_by: str

    @property
    def exit_code(self) -> int:
        """Always 0: an export that cannot be trusted is not there."""
        return 0

    def lines(self) -> list[str]:
        """Say what is where, and how exact it is."""
        into = f" merged into {self.model}" if self.model else f" for {self.format}"
        error = self.max_relative_error
        exact = "every update is the same" if error == 0 else f"updates differ by up to {error:.2g}"
        return [
            f"{self.output}: {self.adapter}{into}, {self.modules} modules, "
            f"{self.dtype or 'types of the base'}, {units.size(self.bytes)}",
            f"read back by {self.read_by}: {exact}",
        ]


def run(config: ExportConfig) -> ExportResult:
    """Export or upload an adapter; refusals come before anything is written.

    Raises:
        WanloraError: The adapter cannot be read or expressed in that format, the output is in the
            way, what was written does not read back as the original, or the hub refuses it.
    """
    if config.push:
        return _push(config, config.push)
    assert config.output is not None  # the configuration requires it
    return _export(config, config.output)


def _push(config: ExportConfig, repository: str) -> ExportResult:
    """Upload a run's adapter, card and newest pictures, and nothing else of its folder.

    Raises:
        OutputError: There is no card, or the hub refuses the upload.
    """
    run_dir = config.adapter if config.adapter.is_dir() else config.adapter.parent
    if not (run_dir / CARD_NAME).is_file():
        raise OutputError(
            f"{run_dir} has no {CARD_NAME}: --push takes the folder of a run, and a run writes its "
            "card when it ends"
        )
    with staging(run_dir / "push") as folder:
        result = _export(config, folder / ADAPTER_NAME)
        model = read_header(Path(result.adapter)).provenance.get("model", "")
        write_text(folder / CARD_NAME, _public_card(run_dir, model, repository))
        for picture in _newest_pictures(run_dir):
            target = folder / picture.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, target)
        address = hub.upload(folder, repository, private=config.private)
    return replace(result, output=address)


def _public_card(run_dir: Path, model: str, repository: str) -> str:
    """Give a run's card with the repository's name, and without paths of this machine."""
    card = (run_dir / CARD_NAME).read_text(encoding="utf-8")
    card = card.replace('"FOLDER"', f'"{repository}"').replace(str(run_dir.absolute()), "FOLDER")
    return card.replace(model, public_name(model)) if Path(model).is_absolute() else card


def _newest_pictures(run_dir: Path) -> list[Path]:
    folders = preview_folders(run_dir)
    return sorted(folders[-1].glob("*.gif")) if folders else []


def _export(config: ExportConfig, output: Path) -> ExportResult:
    header = read_header(adapter_of(config.adapter, config.checkpoint))
    _check_output(config, output, header)
    model = config.model or header.provenance.get("model") or DEFAULT_MODEL
    if config.format == "merged":
        resolve_here(model, PIPELINE)
    from wanlora.adapters.file import read_adapter  # noqa: PLC0415  (imports torch)
    from wanlora.adapters.reread import READERS  # noqa: PLC0415  (imports diffusers)

    adapter = read_adapter(header.path)
    updates = adapter.updates()
    if bad := [module for module, update in updates.items() if not update.is_finite()]:
        raise NonFiniteError(f"{adapter.path} holds NaN or infinity in {bad[0]}: nothing to export")
    adapter = _without_paths(adapter)
    provenance = {
        **adapter.provenance,
        "exported_by": __version__,
        "source_sha256": file_sha256(adapter.path),
    }
    if config.format == "merged":
        made = _merge(config, output, adapter, updates, provenance, model)
    else:
        made = _convert(config, output, adapter, updates, provenance)
    return ExportResult(
        output=str(output),
        format=config.format,
        adapter=str(adapter.path),
        source_format=adapter.format,
        model=made.model,
        dtype=made.dtype,
        modules=len(updates),
        bytes=made.num_bytes,
        max_relative_error=made.error,
        read_by=READERS[config.format],
    )


def _without_paths(adapter: "AdapterFile") -> "AdapterFile":
    """Replace a model's folder in the header by its name: exports are given to other people."""
    key = f"{PROVENANCE_PREFIX}model"
    if key not in adapter.header:
        return adapter
    return replace(adapter, header=adapter.header | {key: public_name(adapter.header[key])})


@dataclass(frozen=True, slots=True)
class _Made:
    """What is only known once an export is there."""

    error: float
    num_bytes: int
    dtype: str | None
    model: str | None = None


def _convert(
    config: ExportConfig,
    output: Path,
    adapter: "AdapterFile",
    updates: "Mapping[str, Update]",
    provenance: Mapping[str, str],
) -> _Made:
    """Write the adapter as another tool's file."""
    from wanlora.adapters.formats import (  # noqa: PLC0415  (imports torch)
        DTYPES,
        PEFT_FILE,
        encode,
        tolerance,
    )
    from wanlora.adapters.reread import check_export  # noqa: PLC0415  (imports diffusers)

    dtype = config.dtype or "float32"
    bound = tolerance(DTYPES[dtype])
    files = encode(
        adapter,
        config.format,
        DTYPES[dtype],
        title=output.stem,
        provenance=provenance,
    )
    with staging(output) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        error = check_export(folder, PEFT_FILE, config.format, adapter, updates)
        if not error <= bound:
            raise AdapterError(
                f"{output} was not written: {dtype} changes an update by {error:.2g} of "
                f"its norm, at most {bound:.2g} expected of its rounding. Its values are too large "
                "or too small for that type: --dtype float32"
            )
        if config.format == "peft":
            publish_folder(folder, output)
        else:
            publish(folder / PEFT_FILE, output)
    return _Made(error, sum(map(len, files.values())), dtype)


def _merge(
    config: ExportConfig,
    output: Path,
    adapter: "AdapterFile",
    updates: "Mapping[str, Update]",
    provenance: Mapping[str, str],
    model: str,
) -> _Made:
    """Multiply the adapter out into a copy of its base."""
    from wanlora.adapters.formats import DTYPES  # noqa: PLC0415  (imports torch)
    from wanlora.adapters.merge import (  # noqa: PLC0415  (imports diffusers)
        check_base,
        check_merged,
        write_merged,
    )

    model_dir = resolve(model, PIPELINE)
    if output.resolve() == model_dir.resolve():
        raise OutputError(f"--output {output} is the base itself; choose another folder")
    check_base(model_dir, adapter)
    dtype = DTYPES[config.dtype] if config.dtype else None
    with staging(output) as folder:
        write_merged(model_dir, updates, folder, dtype=dtype)
        error = check_merged(model_dir, folder, updates)
        write_json(folder / MERGED_RECORD, {"model": public_name(model), "adapter": provenance})
        num_bytes = sum(file.stat().st_size for file in (folder / "transformer").iterdir())
        publish_folder(folder, output)
    if error > MUCH_ROUNDING:
        logger.warning(
            "rounding the merged weights has taken up to %.0f %% of a module's update; "
            "--dtype float32 keeps it, and the adapter beside the base loses nothing",
            100 * error,
        )
    return _Made(error, num_bytes, config.dtype, model)


def _check_output(config: ExportConfig, output: Path, adapter: AdapterHeader) -> None:
    """Refuse to replace what was not asked for, or to spoil a run's folder."""
    require_folder(output.absolute().parent, flag="--output")
    beside = output.absolute().parent / ADAPTER_NAME
    if output.suffix == ".safetensors" and output.name != ADAPTER_NAME and beside.exists():
        raise OutputError(
            f"{output} would stand beside {ADAPTER_NAME}, and diffusers may then pick up either: "
            "choose another folder with --output"
        )
    if not output.exists():
        return
    if output.resolve() in (adapter.path.resolve(), *adapter.path.resolve().parents):
        raise OutputError(f"--output {output} is or holds the adapter itself; choose another name")
    mark = _MARKS.get(config.format)
    is_export = (output / mark).is_file() if mark else output.is_file()
    if not is_export:
        raise OutputError(
            f"{output} is there and is no earlier {config.format} export; choose another --output"
        )
    own = {*_MARKS.values(), "adapter_model.safetensors", *PIPELINE, "model_index.json"}
    if mark and (others := [name for name in foreign_files(output) if name not in own]):
        raise OutputError(
            f"{output} holds {', '.join(others[:3])}, which no export writes, and replacing the "
            "folder would delete it: move it away, or choose another --output"
        )
    if not config.overwrite:
        raise ConfigError(f"{output} would be replaced; pass --overwrite, or another --output")
