"""Which videos there are, and what they show: folders, sidecars and tables of captions."""

from wanlora.captions.find import Failure, Found, Source, find

__all__ = ["Failure", "Found", "Source", "find"]
