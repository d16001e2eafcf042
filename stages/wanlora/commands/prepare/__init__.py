"""Stage zero: videos and captions to a manifest. The pixels stay in the source files.

Owns: train.jsonl, val.jsonl and errors.jsonl of a folder, and the result.
Must not know: the store, models.
"""

from wanlora.commands.prepare.prepare import run
from wanlora.commands.prepare.summary import PrepareResult

__all__ = ["PrepareResult", "run"]
