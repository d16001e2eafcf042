"""Checks of `export` that need no torch: which adapters, for which experts, under which names.

Owns: the adapter of each expert, and the names of the outputs. Must not import torch or diffusers.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wanlora.adapters.header import AdapterHeader, expert_and_place, expert_in_name, read_headers
from wanlora.adapters.trained_on import check_kind
from wanlora.config import DEFAULT_MODEL, ExportConfig
from wanlora.core import units
from wanlora.errors import AdapterError, ConfigError, OutputError
from wanlora.files import foreign_files, require_folder
from wanlora.runs.run_folder import ADAPTER_NAME, CARD_NAME, adapter_of
from wanlora.wan.model_folder import PIPELINE, SECOND, has_second, resolve_pipeline_here
from wanlora.wan.variants import VARIANTS, Expert, Variant, variant_of

MERGED_RECORD = "wanlora.json"

_MARKS = {"peft": "adapter_config.json", "merged": MERGED_RECORD}
"""File by which a folder is recognised as an earlier export, by format."""

_OWN_FILES = {
    *_MARKS.values(), "adapter_model.safetensors", "model_index.json", *PIPELINE, SECOND
}  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter to export.

    Attributes:
        header: Its names and metadata.
        expert: Transformer that it is for; None for a model with one.
        output: The file or folder to write.
    """

    header: AdapterHeader
    expert: Expert | None
    output: Path

    @property
    def subfolder(self) -> str:
        """Sub-folder of the model's folder with the weights that it changes."""
        return SECOND if self.expert == "low" else "transformer"


def run_folder(config: ExportConfig) -> Path:
    """Find the folder of the run to upload.

    Raises:
        OutputError: It has no card.
    """
    (adapter,) = config.adapter  # the configuration requires one for an upload
    folder = adapter if adapter.is_dir() else adapter.parent
    if not (folder / CARD_NAME).is_file():
        raise OutputError(
            f"{folder} has no {CARD_NAME}: --push takes the folder of a run, and a run writes its "
            "card when it ends"
        )
    return folder


def check(config: ExportConfig) -> list[Source]:
    """Refuse adapters, outputs or a model that cannot be used.

    Returns:
        The adapter, or that of the high-noise expert and that of the low-noise expert.

    Raises:
        WanloraError: Names what cannot be used.
    """
    assert config.output is not None  # the configuration requires it
    headers = [
        header
        for path in config.adapter
        for header in read_headers(adapter_of(path, config.checkpoint))
    ]
    experts = _experts(headers, config.expert)
    sources = [
        Source(header, expert, _named(config.output, expert, config.format))
        for header, expert in zip(headers, experts, strict=True)
    ]
    sources.sort(key=lambda source: source.expert or "")  # high, low
    for output in dict.fromkeys(source.output for source in sources):
        _check_output(output, headers, to_format=config.format, overwrite=config.overwrite)
    if config.format == "merged":
        model = base_of(config.model, sources)
        if folder := resolve_pipeline_here(model):
            check_transformers(folder, sources, model=model)
    return sources


def base_of(model: str | None, sources: Sequence[Source]) -> str:
    """Select the model to merge into: as set, else the one that the headers record.

    Args:
        model: The `--model` value.
        sources: The adapters.

    Raises:
        ConfigError: They record different ones, or none for a model with two transformers.
    """
    if model:
        return model
    recorded = sorted(_recorded("model", [source.header for source in sources]))
    if len(recorded) > 1:
        raise ConfigError(
            f"the adapters were trained on different models ({units.names(recorded)}): pass the "
            "--model to merge them into"
        )
    if not recorded and sources[0].expert:
        raise ConfigError(
            f"{sources[0].header.path} does not record the model it was trained on: pass --model, "
            "the folder or hub id of a model with two transformers"
        )
    return recorded[0] if recorded else DEFAULT_MODEL


def check_transformers(folder: Path, sources: Sequence[Source], *, model: str) -> Variant:
    """Check that the model has the transformers that the adapters are for.

    Args:
        folder: Folder of the model.
        sources: The adapters.
        model: The `--model` value, or the model that the adapters record.

    Returns:
        The variant of the model.

    Raises:
        AdapterError: The model has one transformer, and an adapter is for one of two; or the
            reverse; or an adapter is for the other kind of model (text or image to video).
        ModelError: The model does not match any supported variant.
    """
    variant = variant_of(folder, sources[0].expert)
    for source in sources:
        check_kind(source.header, variant, text=f"--adapter {source.header.path}", model=model)
    first = sources[0]
    if first.expert and not has_second(folder):
        raise AdapterError(
            f"{first.header.path} is for the {first.expert}-noise expert of a model with two "
            f"transformers, and the model in {folder} has one: pass the --model that it was "
            "trained on"
        )
    if first.expert is None and has_second(folder):
        raise AdapterError(
            f"the model in {folder} has two transformers, and {first.header.path} does not record "
            "the one it is for: pass --expert high or --expert low"
        )
    return variant


def _experts(headers: Sequence[AdapterHeader], given: Expert | None) -> list[Expert | None]:
    """Find the expert of each adapter: recorded, given by `--expert`, or shown by the file.

    Raises:
        ConfigError: `--expert` contradicts the file, or is given for two adapters or for one of a
            model with one transformer.
        AdapterError: Two adapters are not those of two experts.
    """
    if len(headers) == 1:
        return [_expert_of(headers[0], given)]
    if given:
        raise ConfigError(
            f"--expert {given} is for one adapter, and {units.names([h.path for h in headers])} "
            f"hold {len(headers)}; leave it out"
        )
    experts = [_expert_of(header, None) for header in headers]
    _check_pair(headers, experts)
    return experts


def _expert_of(header: AdapterHeader, given: Expert | None) -> Expert | None:
    if header.expert and given and given != header.expert:
        raise ConfigError(
            f"--expert {given}: {header.path} is for the {header.expert}-noise expert; leave out "
            "--expert"
        )
    row = VARIANTS.get(header.provenance.get("variant", ""))
    if given and row and row.boundary is None:
        raise ConfigError(
            f"--expert {given}: {header.path} was trained on {row.name}, which has one "
            "transformer; leave out --expert"
        )
    expert, place = expert_and_place(header)
    if given and expert and given != expert:
        logger.warning(
            "--expert %s: %s is for the %s-noise expert by its %s; it is exported for the "
            "%s-noise expert", given, header.path, expert, place, given,
        )  # fmt: skip
    if given or place in ("", "header", "keys"):
        return given or expert
    logger.info(
        "%s is for the %s-noise expert, by its %s; --expert overrides this",
        header.path, expert, place,
    )  # fmt: skip
    return expert


def _check_pair(headers: Sequence[AdapterHeader], experts: Sequence[Expert | None]) -> None:
    listed = "; ".join(
        f"{header.path}: {f'{expert}-noise' if expert else 'not recorded'}"
        for header, expert in zip(headers, experts, strict=True)
    )
    if sorted(map(str, experts)) != ["high", "low"]:
        command = "\n  wanlora export --adapter FILE --expert high --output NAME.safetensors"
        remedy = f"; export a file of another tool alone, with its expert:{command}"
        raise AdapterError(
            "two adapters are exported together if one is for the high-noise expert and one for "
            f"the low-noise expert; found {listed}{remedy if None in experts else ''}"
        )
    variants = sorted(_recorded("variant", headers))
    if len(variants) > 1:
        raise AdapterError(
            f"{units.names([header.path for header in headers])} are for different models: "
            f"{units.names(variants)}"
        )


def _recorded(name: str, headers: Sequence[AdapterHeader]) -> set[str]:
    """Collect a value that wanlora recorded in the headers of adapters."""
    return {header.provenance[name] for header in headers if name in header.provenance}


def _named(output: Path, expert: Expert | None, to_format: str) -> Path:
    """Name the export of an expert `NAME_high_noise` or `NAME_low_noise`; a merged model, `NAME`.

    Raises:
        ConfigError: The name has the other expert in it.
    """
    named = expert_in_name(output.name)
    if expert is None or to_format == "merged" or named == expert:
        return output
    if named:
        raise ConfigError(
            f"--output {output} names the {named}-noise expert, and the adapter is for the "
            f"{expert}-noise expert: leave the expert out of the name, it is added"
        )
    return output.with_name(f"{output.stem}_{expert}_noise{output.suffix}")


def _check_output(
    output: Path, adapters: Sequence[AdapterHeader], *, to_format: str, overwrite: bool
) -> None:
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
    for adapter in adapters:
        if output.resolve() in (adapter.path.resolve(), *adapter.path.resolve().parents):
            raise OutputError(
                f"--output {output} is or holds the adapter itself; choose another name"
            )
    mark = _MARKS.get(to_format)
    is_export = (output / mark).is_file() if mark else output.is_file()
    if not is_export:
        raise OutputError(
            f"{output} exists and is not an earlier {to_format} export; choose another --output"
        )
    if mark and (others := [name for name in foreign_files(output) if name not in _OWN_FILES]):
        raise OutputError(
            f"{output} contains {', '.join(others[:3])}, which an export does not write, and "
            "replacing the folder would delete it: move it away, or choose another --output"
        )
    if not overwrite:
        raise ConfigError(f"{output} would be replaced; pass --overwrite, or another --output")
