"""Stage zero: videos and captions to a manifest. The pixels stay in the source files.

Owns: train.jsonl, val.jsonl and errors.jsonl of a folder, and what is said about them.
"""

from wanlora.prepare.result import PrepareResult
from wanlora.prepare.stage import run

__all__ = ["PrepareResult", "run"]
