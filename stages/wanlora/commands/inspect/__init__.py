"""`wanlora inspect`: look into a cache, check it, mend it, clean it."""

from wanlora.commands.inspect.cache import run
from wanlora.commands.inspect.summary import InspectResult

__all__ = ["InspectResult", "run"]
