"""Write the card of the small image-to-video model: its data, settings and measured quality.

Owns: the text of the README.md in its folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.micro import measure_image
from tools.micro.card import hashes, measured_table
from tools.micro.dit import Stage
from wanlora.micro import world

_ABOUT = """\
# micro-i2v: a miniature of Wan's image-to-video models

The transformer of wanlora's `micro` with 36 input channels instead of 16, fine-tuned to
make a video from its first frame and a prompt. The mask and the condition are those of Wan2.1 and
Wan2.2 (`WanImageToVideoPipeline`); there is no image encoder, as in Wan2.2. VAE, text encoder and
tokenizer are the files of micro.
"""


def text(folder: Path, figures: dict[str, Any], stages: Sequence[Stage]) -> str:
    """Write the card of the model in a folder."""
    parts = (_data(), _results(figures), _settings(stages), hashes(folder, ("transformer",)))
    return "\n".join([_ABOUT, *(line for part in parts for line in part), ""])


def _data() -> list[str]:
    return [
        f"- **Data**: clips drawn by `wanlora.micro.world`, of {', '.join(world.KNOWN)}. Half of",
        "  the shapes start nearer to the middle of the picture than in the world's own clips, so",
        "  that the image does not show their direction. A quarter of the prompts name no colours.",
        "- **Not for** anything outside that world.",
        "- **Made by** `make micro-i2v`; licence Apache-2.0, as the code.",
        "",
    ]


def _results(figures: dict[str, Any]) -> list[str]:
    bars = measure_image.BARS
    names = {
        "first_frame_psnr_db": "first frame against the image: PSNR, median, dB",
        "direction": "clips that match the prompt: direction",
        "colour": "clips that match the prompt and the image: colour",
        "background": "clips that match the prompt and the image: background",
        "colour_of_the_image": "prompt without colours: colour of the image",
        "background_of_the_image": "prompt without colours: background of the image",
        "concept_short_prompt": "prompt without colours: clips that match it",
        "direction_from_the_middle": "one image, a prompt for each direction: direction",
    }
    rows = [(title, figures[name], bars.get(name)) for name, title in names.items()]
    rows[1:1] = [
        ("the same by the VAE alone", figures["first_frame_psnr_db_of_the_vae"], None),
        ("the same by micro, which sees no image", figures["first_frame_psnr_db_without_an_image"],
         None),
        *((f"clips that match the prompt: {name}", value, bars["concept"])
          for name, value in figures["concept"].items()),
    ]  # fmt: skip
    return [
        "## Measured",
        "",
        f"On seeds that were not used in training; {figures['clips_per_concept']} clips per class,",
        "20 steps, guidance 3, by `tools.micro.measure_image`. The first pose of a person shows",
        "the activity, so only the direction of shapes shows that the prompt decides.",
        "",
        *measured_table(rows),
        "",
    ]


def _settings(stages: Sequence[Stage]) -> list[str]:
    described = "; then ".join(
        f"{stage.steps} steps of {stage.batch} out of {stage.clips_per_concept} clips a class, "
        f"Muon {stage.muon_rate:g}, AdamW {stage.adamw_rate:g}, mean of weights with decay "
        f"{stage.ema_decay:g}"
        for stage in stages
    )
    return [
        "## Settings",
        "",
        f"From micro's weights, with zeros for the new channels: {described}. The rest is as for",
        "micro.",
        "",
    ]
