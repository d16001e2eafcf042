"""The command line, with a line in a file for every encoding it does: run as a program.

A process that is killed cannot be asked how much it did; the file can. What runs is the product:
the encoders' own methods are wrapped, not replaced.
"""

import os
import sys
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan
from transformers import UMT5EncoderModel

from wanlora.cli import main

COUNTED = ((AutoencoderKLWan, "encode", "latents"), (UMT5EncoderModel, "forward", "text"))


def count_encodings(log: Path) -> None:
    """Append `latents` or `text` to a file before each encoding of a clip or a prompt."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for owner, name, kind in COUNTED:
        encode = getattr(owner, name)

        def counted(*args: Any, encode: Any = encode, kind: str = kind, **kwargs: Any) -> Any:
            os.write(file, f"{kind}\n".encode())
            return encode(*args, **kwargs)

        setattr(owner, name, counted)


if __name__ == "__main__":
    count_encodings(Path(sys.argv.pop(1)))
    main()
