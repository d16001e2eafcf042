"""Which videos there are, and what they show: folders, sidecars and tables of captions."""

from wanlora.data.captions.find import Found, Source, find
from wanlora.data.captions.folders import Failure

__all__ = ["Failure", "Found", "Source", "find"]
