"""`wanlora inspect`: look into a cache, check it, mend it, clean it.

stage.py        run(): what is counted, and which job was asked for
result.py       what the command prints and returns
checks.py       fast and full verification
mend.py         --repair and --gc
statistics.py   per-channel and per-clip statistics of latents, outliers
page.py         --html: pictures from the stored projection, no VAE
decode.py       --decode: through the VAE, beside the source
"""

from wanlora.inspect_cache.result import InspectResult
from wanlora.inspect_cache.stage import run

__all__ = ["InspectResult", "run"]
