"""`wanlora inspect PATH`: a cache or an adapter.

Owns: the choice between them, and the refusal of flags that only a cache has.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from wanlora.adapters.header import read_header
from wanlora.config import InspectConfig
from wanlora.errors import ConfigError, StoreError
from wanlora.runs.run_folder import CONFIG_NAME
from wanlora.store import schema

if TYPE_CHECKING:
    from wanlora.commands.inspect import InspectResult
    from wanlora.commands.inspect.adapter import AdapterReport


def run(config: InspectConfig) -> "InspectResult | AdapterReport":
    """Inspect the cache or the adapter at the path.

    Raises:
        WanloraError: There is neither a cache nor an adapter, or it cannot be read.
    """
    if not isinstance(config.path, Path) or (config.path / schema.STORE).exists():
        from wanlora.commands import inspect  # noqa: PLC0415  (imports zarr)

        return inspect.run(config)
    _require_adapter(config, config.path)
    from wanlora.commands.inspect import adapter  # noqa: PLC0415  (imports torch)

    return adapter.run(config.path)


def _require_adapter(config: InspectConfig, path: Path) -> None:
    """Refuse a path that holds no adapter, before torch is imported."""
    if (path / "model_index.json").is_file():
        raise StoreError(
            f"{path} is a whole model, neither a cache nor an adapter; generate with it: "
            f"wanlora sample --model {path} --prompt '...'"
        )
    if not is_adapter(path):
        raise StoreError(
            f"no latent cache in {path}, and no adapter: expected {schema.STORE} in it, a "
            "run's folder or a .safetensors file; a cache is made with: wanlora cache-latents "
            f"--cache {path}"
        )
    if unused := sorted(config.model_fields_set - {"path"}):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ConfigError(f"{path} is an adapter, not a cache: leave out {names}")
    read_header(path)


def is_adapter(path: Path) -> bool:
    """Return True for the file of an adapter, or a folder that has one or will have one."""
    holds_one = (path / CONFIG_NAME).is_file() or any(path.glob("*.safetensors"))
    return path.suffix == ".safetensors" or holds_one
