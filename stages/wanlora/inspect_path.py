"""`wanlora inspect`: a cache or an adapter, by what the path is.

Owns: telling them apart, and refusing flags that only a cache has.
"""

from pathlib import Path

from wanlora import inspect_adapter, inspect_cache
from wanlora.config import InspectConfig
from wanlora.errors import ConfigError, StoreError
from wanlora.inspect_adapter import AdapterReport
from wanlora.inspect_cache import InspectResult
from wanlora.runs import CONFIG_NAME
from wanlora.store import schema


def run(config: InspectConfig) -> InspectResult | AdapterReport:
    """Inspect what is at the path.

    Raises:
        WanloraError: There is neither a cache nor an adapter, or it cannot be read.
    """
    if not isinstance(config.path, Path) or (config.path / schema.STORE).exists():
        return inspect_cache.run(config)
    if (config.path / "model_index.json").is_file():
        raise StoreError(
            f"{config.path} is a whole model, neither a cache nor an adapter; generate with it: "
            f"wanlora sample --model {config.path} --prompt '...'"
        )
    if not is_adapter(config.path):
        raise StoreError(
            f"no latent cache in {config.path}, and no adapter: expected {schema.STORE} in it, a "
            "run's folder or a .safetensors file; a cache is made with: wanlora cache-latents "
            f"--cache {config.path}"
        )
    if unused := sorted(config.model_fields_set - {"path"}):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ConfigError(f"{config.path} is an adapter, not a cache: leave out {names}")
    return inspect_adapter.run(config.path)


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter's file, or a folder that holds one or will."""
    holds_one = (path / CONFIG_NAME).is_file() or any(path.glob("*.safetensors"))
    return path.suffix == ".safetensors" or holds_one
