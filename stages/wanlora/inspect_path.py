"""`wanlora inspect`: a cache or an adapter, by what the path is.

Owns: telling them apart, and refusing flags that only a cache has.
"""

from pathlib import Path

from wanlora import inspect_adapter, inspect_cache
from wanlora.config import InspectConfig
from wanlora.core.location import Location
from wanlora.errors import ConfigError
from wanlora.inspect_adapter import AdapterReport
from wanlora.inspect_cache import InspectResult
from wanlora.runs import CONFIG_NAME
from wanlora.store import schema


def run(config: InspectConfig) -> InspectResult | AdapterReport:
    """Inspect what is at the path.

    Raises:
        WanloraError: There is neither a cache nor an adapter, or it cannot be read.
    """
    if not isinstance(config.path, Path) or not is_adapter(config.path):
        return inspect_cache.run(config)
    if unused := sorted(config.model_fields_set - {"path"}):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ConfigError(f"{config.path} is an adapter, not a cache: leave out {names}")
    return inspect_adapter.run(config.path)


def is_adapter(path: Location) -> bool:
    """Whether a path names an adapter rather than a cache: a file of one, or a folder with one."""
    if not isinstance(path, Path) or (path / schema.STORE).exists():
        return False
    if path.suffix == ".safetensors" or path.is_file():
        return True
    return (path / CONFIG_NAME).is_file() or any(path.glob("*.safetensors"))
