"""Write exports: adapters for another tool, or a model with adapters merged into it.

Owns: the moment at which an export appears. It is written into a hidden folder, read back by the
library that its users have, compared with the original module by module, and renamed only then. An
export contains no path of this machine.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from wanlora import __version__
from wanlora.adapters.file import AdapterFile, load_adapter
from wanlora.adapters.formats import DTYPES, PEFT_FILE, encode, tolerance
from wanlora.adapters.header import PROVENANCE_PREFIX, read_header
from wanlora.adapters.merge import check_base, check_merged, write_merged
from wanlora.adapters.reread import READERS, check_export
from wanlora.adapters.trained_on import Kind, kind_of, log_unknown_kind
from wanlora.adapters.updates import Update
from wanlora.commands.export.export_result import ExportPair, ExportResult
from wanlora.commands.export.preflight import MERGED_RECORD, Source, base_of, check_transformers
from wanlora.config import ExportConfig
from wanlora.errors import AdapterError, NonFiniteError, OutputError
from wanlora.files import publish, publish_folder, staging, write_json
from wanlora.progress import waiting
from wanlora.wan.model_folder import public_name, resolve_pipeline
from wanlora.wan.weights import file_sha256

MUCH_ROUNDING = 0.05
"""Share of an update that rounding of the merged weights may lose without a warning."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An adapter with its tensors.

    Attributes:
        source: Its header, expert and output.
        adapter: Its tensors; its header without paths of this machine.
        updates: The update of each module.
        provenance: Values to record in the export.
    """

    source: Source
    adapter: AdapterFile
    updates: Mapping[str, Update]
    provenance: Mapping[str, str]

    def result(self, to_format: str, *, dtype: str | None, num_bytes: int, error: float,
               model: str | None = None, kind: Kind | None = None) -> ExportResult:  # fmt: skip
        """Describe its export; see `ExportResult`."""
        return ExportResult(
            output=str(self.source.output),
            format=to_format,
            adapter=str(self.adapter.path),
            expert=self.source.expert,
            source_format=self.adapter.format,
            model=model,
            dtype=dtype,
            modules=len(self.updates),
            bytes=num_bytes,
            max_relative_error=error,
            read_by=READERS[to_format],
            kind=kind or kind_of(self.source.header),
        )


def run(config: ExportConfig, sources: Sequence[Source]) -> ExportResult | ExportPair:
    """Export one adapter, or those of two experts.

    Args:
        config: Settings.
        sources: From `preflight.check`.

    Raises:
        WanloraError: An adapter cannot be converted or merged, or the written files do not read
            back as the originals.
    """
    with waiting(f"writing {config.output}, and reading it back"):
        if config.format == "merged":
            made = merge(sources, model=base_of(config.model, sources), dtype=config.dtype)
        else:
            made = convert(sources, to_format=config.format, dtype=config.dtype)
    return made[0] if len(made) == 1 else ExportPair(made)


def convert(sources: Sequence[Source], *, to_format: str, dtype: str | None) -> list[ExportResult]:
    """Write adapters in the format of another tool; none of them if one cannot be written.

    Args:
        sources: From `preflight.check`.
        to_format: A row of `FORMATS`.
        dtype: Type of the numbers; None = float32.

    Raises:
        WanloraError: See `run`.
    """
    dtype = dtype or "float32"
    adapters = [_load(source) for source in sources]
    contents = [
        encode(
            loaded.adapter, to_format, DTYPES[dtype], title=loaded.source.output.stem,
            provenance=loaded.provenance,
        )
        for loaded in adapters
    ]  # fmt: skip
    results = []
    with ExitStack() as stack:
        folders = [stack.enter_context(staging(loaded.source.output)) for loaded in adapters]
        for loaded, files, folder in zip(adapters, contents, folders, strict=True):
            for name, data in files.items():
                (folder / name).write_bytes(data)
            error = _read_back(loaded, folder, to_format, dtype)
            num_bytes = sum(map(len, files.values()))
            results.append(loaded.result(to_format, dtype=dtype, num_bytes=num_bytes, error=error))
        for loaded, folder in zip(adapters, folders, strict=True):
            if to_format == "peft":
                publish_folder(folder, loaded.source.output)
            else:
                publish(folder / PEFT_FILE, loaded.source.output)
    return results


def _read_back(loaded: _Loaded, folder: Path, to_format: str, dtype: str) -> float:
    """Load a written adapter with the library of its users; returns the largest relative error.

    Raises:
        AdapterError: It reads back differently.
    """
    output, bound = loaded.source.output, tolerance(DTYPES[dtype])
    error = check_export(folder, PEFT_FILE, to_format, loaded.adapter, loaded.updates)
    if not error <= bound:
        raise AdapterError(
            f"{output} was not written: {dtype} changes an update by {error:.2g} of "
            f"its norm, at most {bound:.2g} expected of its rounding. Its values are too large "
            "or too small for that type: --dtype float32"
        )
    recorded = read_header(folder / PEFT_FILE).expert
    assert recorded == loaded.source.expert, "the expert is not in the export's header"
    return error


def merge(sources: Sequence[Source], *, model: str, dtype: str | None) -> list[ExportResult]:
    """Add the updates of adapters to a copy of the base's weights, each to its transformer.

    Args:
        sources: From `preflight.check`; all have the same output.
        model: The base.
        dtype: Type of the numbers; None = the base's.

    Raises:
        WanloraError: See `run`.
    """
    output = sources[0].output
    model_dir = resolve_pipeline(model)
    if output.resolve() == model_dir.resolve():
        raise OutputError(f"--output {output} is the base itself; choose another folder")
    variant = check_transformers(model_dir, sources, model=model)
    for source in sources:
        log_unknown_kind(source.header, variant, model=model)
    adapters = {source.subfolder: _load(source) for source in sources}
    for part, loaded in adapters.items():
        check_base(model_dir / part, loaded.adapter)
    results = []
    with staging(output) as folder:
        written = write_merged(
            model_dir,
            {part: loaded.updates for part, loaded in adapters.items()},
            folder,
            dtype=DTYPES[dtype] if dtype else None,
        )
        for part in written:
            merged = adapters.get(part)
            error = check_merged(model_dir, folder, part, merged.updates if merged else {})
            if merged is None:  # only its type was changed
                continue
            num_bytes = sum(file.stat().st_size for file in (folder / part).iterdir())
            results.append(
                merged.result(
                    "merged", dtype=dtype, num_bytes=num_bytes, error=error, model=model,
                    kind="I2V" if variant.is_i2v else "T2V",
                )
            )  # fmt: skip
        write_json(folder / MERGED_RECORD, _record(model, list(adapters.values())))
        publish_folder(folder, output)
    _warn_of_rounding(max(result.max_relative_error for result in results))
    return results


def _record(model: str, adapters: Sequence[_Loaded]) -> dict[str, object]:
    """Origin of a merged model."""
    base = {"model": public_name(model)}
    if len(adapters) == 1:
        return {**base, "adapter": adapters[0].provenance}
    return {**base, "adapters": [loaded.provenance for loaded in adapters]}


def _warn_of_rounding(error: float) -> None:
    if error > MUCH_ROUNDING:
        logger.warning(
            "rounding the merged weights loses up to %.0f %% of a module's update; "
            "--dtype float32 avoids this, and an adapter that is not merged loses nothing",
            100 * error,
        )


def _load(source: Source) -> _Loaded:
    """Read an adapter's tensors.

    Raises:
        NonFiniteError: A tensor holds NaN or infinity.
        AdapterError: The adapter cannot be used.
    """
    adapter = _without_paths(replace(load_adapter(source.header), expert=source.expert))
    updates = adapter.updates()
    if bad := [module for module, update in updates.items() if not update.is_finite()]:
        raise NonFiniteError(f"{adapter.path} holds NaN or infinity in {bad[0]}: nothing to export")
    provenance = {
        **adapter.provenance,
        **({"expert": source.expert} if source.expert else {}),
        "exported_by": __version__,
        "source_sha256": file_sha256(adapter.path),
    }
    return _Loaded(source, adapter, updates, provenance)


def _without_paths(adapter: AdapterFile) -> AdapterFile:
    """Replace a model's folder in the header by its name: exports are given to other people."""
    key = f"{PROVENANCE_PREFIX}model"
    if key not in adapter.header:
        return adapter
    return replace(adapter, header=adapter.header | {key: public_name(adapter.header[key])})
