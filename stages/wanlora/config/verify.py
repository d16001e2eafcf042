"""Settings of `wanlora verify`."""

from pathlib import Path

from wanlora.config.settings import (
    DEFAULT_MODEL,
    HtmlClips,
    Settings,
    SourceRoot,
    TokenizerOf,
    setting,
)


class VerifyConfig(Settings):
    """Load clips as cache-latents does, and list the clips that fail, with the reason."""

    manifests: tuple[Path, ...] = setting(
        (Path("data/processed"),),
        "Manifest files, or a folder with train.jsonl and val.jsonl.",
        flag="Input and output",
        argument=True,
    )
    source_root: SourceRoot = ()
    limit: int = setting(
        0, "Load only the first N clips of each manifest; 0 = all.", ge=0, flag="Options"
    )
    html: Path | None = setting(
        None, "Write a contact sheet of the loaded clips to this file.", flag="Input and output"
    )
    html_clips: HtmlClips = 1000
    model: TokenizerOf = DEFAULT_MODEL
