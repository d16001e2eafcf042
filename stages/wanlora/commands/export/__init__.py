"""`wanlora export`: adapters for another tool, a merged model, or an upload to the hub."""

from typing import TYPE_CHECKING

from wanlora.commands.export import preflight
from wanlora.config import ExportConfig

if TYPE_CHECKING:
    from wanlora.commands.export.export_result import ExportPair, ExportResult

__all__ = ["run"]


def run(config: ExportConfig) -> "ExportResult | ExportPair":
    """Check everything that needs no tensors, then export or upload.

    Raises:
        WanloraError: An adapter cannot be read or converted, the output exists, the written file
            does not read back as the original, or the hub refuses the upload.
    """
    if config.push:
        preflight.run_folder(config)
        from wanlora.commands.export import push  # noqa: PLC0415  (imports torch)

        return push.run(config)
    sources = preflight.check(config)
    from wanlora.commands.export import export  # noqa: PLC0415  (imports torch)

    return export.run(config, sources)
