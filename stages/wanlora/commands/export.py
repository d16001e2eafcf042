"""`wanlora export`: convert an adapter for another tool, merge it into its base, or upload it.

Owns: the path of an export, and the moment at which it appears. It is written into a hidden folder,
read back by the library that its users have, compared with the original module by module, and
renamed only then. An export contains no path of this machine.
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
from wanlora.config.export import ExportFormat
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
from wanlora.progress import waiting
from wanlora.runs.run_folder import ADAPTER_NAME, CARD_NAME, adapter_of, newest_pictures
from wanlora.wan import hub
from wanlora.wan.model_folder import PIPELINE, public_name, resolve, resolve_here
from wanlora.wan.weights import file_sha256

if TYPE_CHECKING:
    from wanlora.adapters.file import AdapterFile
    from wanlora.adapters.updates import Update

MERGED_RECORD = "wanlora.json"
MUCH_ROUNDING = 0.05
"""Share of an update that rounding of the merged weights may lose without a warning."""

_MARKS = {"peft": "adapter_config.json", "merged": MERGED_RECORD}
"""File by which a folder is recognised as an earlier export, by format."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Result of an export.

    Attributes:
        output: The new file or folder; after a push the address of the repository.
        format: Its format.
        adapter: The exported adapter.
        source_format: Format of the exported adapter.
        model: The base model that the adapter was merged into; None for an adapter.
        dtype: Type of the numbers; None = the base's.
        modules: Number of adapted modules.
        bytes: Size of the new weights on disk.
        max_relative_error: Maximum relative error of a module's update after it is read back.
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
        """Always 0: an export that fails its check is an error, and writes nothing."""
        return 0

    def lines(self) -> list[str]:
        """Format the path, the size and the error of the export."""
        into = f" merged into {self.model}" if self.model else f" for {self.format}"
        error = self.max_relative_error
        exact = "every update is the same" if error == 0 else f"updates differ by up to {error:.2g}"
        return [
            f"{self.output}: {self.adapter}{into}, {self.modules} modules, "
            f"{self.dtype or 'types of the base'}, {units.size(self.bytes)}",
            f"read back by {self.read_by}: {exact}",
        ]


def run(config: ExportConfig) -> ExportResult:
    """Export or upload an adapter. All checks of the input run before anything is written.

    Raises:
        WanloraError: The adapter cannot be read or converted, the output exists, the written file
            does not read back as the original, or the hub refuses the upload.
    """
    if config.push:
        return _push(
            config.adapter, config.push,
            checkpoint=config.checkpoint, dtype=config.dtype, private=config.private,
        )  # fmt: skip
    assert config.output is not None  # the configuration requires it
    return _export(
        adapter_of(config.adapter, config.checkpoint), config.output, to_format=config.format,
        dtype=config.dtype, model=config.model, overwrite=config.overwrite,
    )  # fmt: skip


def _push(
    adapter: Path, repository: str, *, checkpoint: str, dtype: str | None, private: bool
) -> ExportResult:
    """Upload a run's adapter, card and newest pictures, and nothing else of its folder.

    Raises:
        OutputError: There is no card, or the hub refuses the upload.
    """
    run_dir = adapter if adapter.is_dir() else adapter.parent
    if not (run_dir / CARD_NAME).is_file():
        raise OutputError(
            f"{run_dir} has no {CARD_NAME}: --push takes the folder of a run, and a run writes its "
            "card when it ends"
        )
    with staging(run_dir / "push") as folder:
        result = _export(adapter_of(adapter, checkpoint), folder / ADAPTER_NAME, dtype=dtype)
        model = read_header(Path(result.adapter)).provenance.get("model", "")
        write_text(folder / CARD_NAME, _public_card(run_dir, model, repository))
        for picture in newest_pictures(run_dir):
            target = folder / picture.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, target)
        address = hub.upload(folder, repository, private=private)
    return replace(result, output=address)


def _public_card(run_dir: Path, model: str, repository: str) -> str:
    """Return a run's card with the repository's name and without paths of this machine."""
    card = (run_dir / CARD_NAME).read_text(encoding="utf-8")
    card = card.replace('"FOLDER"', f'"{repository}"').replace(str(run_dir.absolute()), "FOLDER")
    return card.replace(model, public_name(model)) if Path(model).is_absolute() else card


def _export(
    path: Path,
    output: Path,
    *,
    to_format: ExportFormat = "diffusers",
    dtype: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Export the adapter at a path.

    Args:
        path: The adapter.
        output: The file or folder to write.
        to_format: Format of the export.
        dtype: Type of the numbers; None = float32, and for merged the base's.
        model: Base to merge into; None = the adapter's.
        overwrite: True to replace an earlier export.

    Raises:
        WanloraError: See `run`.
    """
    header = read_header(path)
    _check_output(output, header, to_format=to_format, overwrite=overwrite)
    model = model or header.provenance.get("model") or DEFAULT_MODEL
    if to_format == "merged":
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
    with waiting(f"writing {output}, and reading it back with {READERS[to_format]}"):
        if to_format == "merged":
            made = _merge(output, adapter, updates, provenance, model=model, dtype=dtype)
        else:
            made = _convert(
                output, adapter, updates, provenance, to_format=to_format, dtype=dtype or "float32"
            )
    return ExportResult(
        output=str(output),
        format=to_format,
        adapter=str(adapter.path),
        source_format=adapter.format,
        model=made.model,
        dtype=made.dtype,
        modules=len(updates),
        bytes=made.num_bytes,
        max_relative_error=made.error,
        read_by=READERS[to_format],
    )


def _without_paths(adapter: "AdapterFile") -> "AdapterFile":
    """Replace a model's folder in the header by its name: exports are given to other people."""
    key = f"{PROVENANCE_PREFIX}model"
    if key not in adapter.header:
        return adapter
    return replace(adapter, header=adapter.header | {key: public_name(adapter.header[key])})


@dataclass(frozen=True, slots=True)
class _Made:
    """An export that was written.

    Attributes:
        error: Maximum relative error of a module's update.
        num_bytes: Size of the new weights.
        dtype: Type of the numbers; None = the base's.
        model: The base model that the adapter was merged into, if any.
    """

    error: float
    num_bytes: int
    dtype: str | None
    model: str | None = None


def _convert(
    output: Path,
    adapter: "AdapterFile",
    updates: "Mapping[str, Update]",
    provenance: Mapping[str, str],
    *,
    to_format: str,
    dtype: str,
) -> _Made:
    """Write the adapter in the format of another tool."""
    from wanlora.adapters.formats import (  # noqa: PLC0415  (imports torch)
        DTYPES,
        PEFT_FILE,
        encode,
        tolerance,
    )
    from wanlora.adapters.reread import check_export  # noqa: PLC0415  (imports diffusers)

    bound = tolerance(DTYPES[dtype])
    files = encode(adapter, to_format, DTYPES[dtype], title=output.stem, provenance=provenance)
    with staging(output) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        error = check_export(folder, PEFT_FILE, to_format, adapter, updates)
        if not error <= bound:
            raise AdapterError(
                f"{output} was not written: {dtype} changes an update by {error:.2g} of "
                f"its norm, at most {bound:.2g} expected of its rounding. Its values are too large "
                "or too small for that type: --dtype float32"
            )
        if to_format == "peft":
            publish_folder(folder, output)
        else:
            publish(folder / PEFT_FILE, output)
    return _Made(error, sum(map(len, files.values())), dtype)


def _merge(
    output: Path,
    adapter: "AdapterFile",
    updates: "Mapping[str, Update]",
    provenance: Mapping[str, str],
    *,
    model: str,
    dtype: str | None,
) -> _Made:
    """Add the adapter's updates to a copy of the base's weights."""
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
    with staging(output) as folder:
        write_merged(model_dir, updates, folder, dtype=DTYPES[dtype] if dtype else None)
        error = check_merged(model_dir, folder, updates)
        write_json(folder / MERGED_RECORD, {"model": public_name(model), "adapter": provenance})
        num_bytes = sum(file.stat().st_size for file in (folder / "transformer").iterdir())
        publish_folder(folder, output)
    if error > MUCH_ROUNDING:
        logger.warning(
            "rounding the merged weights loses up to %.0f %% of a module's update; "
            "--dtype float32 avoids this, and an adapter that is not merged loses nothing",
            100 * error,
        )
    return _Made(error, num_bytes, dtype, model)


def _check_output(output: Path, adapter: AdapterHeader, *, to_format: str, overwrite: bool) -> None:
    """Check that the output does not replace other files and is not beside a run's adapter.

    Raises:
        OutputError: It would.
        ConfigError: An earlier export exists, and `overwrite` is not set.
    """
    require_folder(output.absolute().parent, flag="--output")
    beside = output.absolute().parent / ADAPTER_NAME
    if output.suffix == ".safetensors" and output.name != ADAPTER_NAME and beside.exists():
        raise OutputError(
            f"{output} would be in one folder with {ADAPTER_NAME}, and diffusers might load either "
            "of them: choose another folder with --output"
        )
    if not output.exists():
        return
    if output.resolve() in (adapter.path.resolve(), *adapter.path.resolve().parents):
        raise OutputError(f"--output {output} is or holds the adapter itself; choose another name")
    mark = _MARKS.get(to_format)
    is_export = (output / mark).is_file() if mark else output.is_file()
    if not is_export:
        raise OutputError(
            f"{output} exists and is not an earlier {to_format} export; choose another --output"
        )
    own = {*_MARKS.values(), "adapter_model.safetensors", *PIPELINE, "model_index.json"}
    if mark and (others := [name for name in foreign_files(output) if name not in own]):
        raise OutputError(
            f"{output} contains {', '.join(others[:3])}, which an export does not write, and "
            "replacing the folder would delete it: move it away, or choose another --output"
        )
    if not overwrite:
        raise ConfigError(f"{output} would be replaced; pass --overwrite, or another --output")
