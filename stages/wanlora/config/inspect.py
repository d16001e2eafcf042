"""Settings of `wanlora inspect`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from wanlora.config.cache_latents import StoreSettings
from wanlora.config.settings import CacheLocation, Device, HtmlClips, Settings, SourceRoot, setting


class InspectConfig(Settings):
    """Show what a cache or an adapter contains; check, repair or clean up a cache."""

    path: CacheLocation = setting(
        Path("cache"),
        "Cache folder or URL, run folder, PEFT folder or adapter file.",
        flag="Input and output",
        argument=True,
    )
    verify: Annotated[
        Literal["fast", "full"] | None,
        BeforeValidator(lambda value: {True: "full", False: None}.get(value, value)),
    ] = setting(
        None,
        "Check the cache. fast: commit records and the sizes of objects; full (also --verify "
        "without a value): read each row and check its checksum, and that its values are finite "
        "and not constant.",
        flag="Maintenance",
        bare="full",
    )
    repair: bool = setting(
        False, "Verify in full, delete the bad rows, and encode them again.", flag="Maintenance"
    )
    gc: bool = setting(
        False,
        "Delete rows that no view and no unfinished run of cache-latents uses, duplicate rows, and "
        "leftovers of interrupted runs.",
        flag="Maintenance",
    )
    dry_run: bool = setting(False, "With --gc: print what it would delete.", flag="Maintenance")
    html: Path | None = setting(
        None,
        "Write a page with pictures, captions and statistics of clips.",
        flag="Input and output",
    )
    decode: tuple[str, ...] = setting(
        (),
        "Clip id, or the start of a clip key: decode the clip with the VAE to an mp4 that shows "
        "it next to its source. Repeat for several.",
        flag="Input and output",
    )
    output_dir: Path = setting(
        Path("outputs/decoded"), "Folder for decoded clips.", flag="Input and output"
    )
    manifest: tuple[Path, ...] = setting(
        (Path("data/processed"),),
        "With --repair: manifest that the cache was made from; repeat for several.",
        flag="Input and output",
    )
    source_root: SourceRoot = ()
    device: Device = "auto"
    statistics_clips: int = setting(
        32,
        "Number of clips per bucket used for statistics, evenly spaced; --verify full and --html "
        "use all clips.",
        ge=0,
    )
    html_clips: HtmlClips = 1000
    gc_min_age_h: float = setting(
        24.0,
        "Minimum age in hours of the rows that --gc may delete because no view and no unfinished "
        "run of cache-latents uses them.",
        ge=0,
    )
    gc_drop_wants: tuple[str, ...] = setting(
        (),
        "With --gc: unfinished runs of cache-latents whose rows may be deleted, by the names that "
        "inspect lists.",
    )
    store: StoreSettings = StoreSettings()

    @model_validator(mode="after")
    def _one_job(self) -> Self:
        if self.repair and self.gc:
            raise ValueError("repair and gc cannot be combined: run one after the other")
        if self.dry_run and not self.gc:
            raise ValueError("dry_run needs gc")
        if self.gc_drop_wants and not self.gc:
            raise ValueError("gc_drop_wants needs gc")
        return self
