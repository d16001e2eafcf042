"""`wanlora inspect`: the content of a cache or an adapter, and the maintenance of a cache."""

from wanlora.commands.inspect.cache import run
from wanlora.commands.inspect.summary import InspectResult

__all__ = ["InspectResult", "run"]
