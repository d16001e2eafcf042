"""Settings of `wanlora demo`."""

from pathlib import Path
from typing import Literal

from wanlora.config.settings import Settings, seed_setting, setting


class DemoConfig(Settings):
    """Run the whole pipeline on an embedded micro model and drawn videos; minutes on a CPU."""

    output_dir: Path = setting(Path("outputs/demo"), "Folder for all its files.", flag="Options")
    concept: Literal["clapping", "striped", "triangle"] = setting(
        "clapping", "Concept to teach; the base model was trained on none of them.", flag="Options"
    )
    max_steps: int = setting(200, "Number of training steps.", ge=1, flag="Options")
    known_videos: int = setting(
        24,
        "Number of videos of concepts that the base model was trained on, added so that it does "
        "not forget them.",
        ge=0,
        flag="Options",
    )
    seed: int = seed_setting("Options")
