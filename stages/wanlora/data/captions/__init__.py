"""Sources and their captions: folders, .txt sidecars and tables."""

from wanlora.data.captions.find import Found, Source, find
from wanlora.data.captions.folders import Failure

__all__ = ["Failure", "Found", "Source", "find"]
