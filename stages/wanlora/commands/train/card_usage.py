"""Section "Use" of a model card: code for diffusers, and commands of wanlora.

Owns: this section, except the license.
"""

import re
from collections.abc import Mapping
from typing import Any

from wanlora.core.buckets import DEFAULT_FPS
from wanlora.runs.run_folder import ADAPTER_NAME

_GUIDANCE = ("guidance_scale", "guidance_scale_2")

FOLDER = "FOLDER"
"""Placeholder of the adapter's folder in the commands; a push replaces it in diffusers' code."""

IMAGE = "image.png"
"""Placeholder of the first frame of a video."""


def usage(facts: Mapping[str, Any]) -> str:
    """Code for diffusers, and a command of wanlora, with the first prompt of the run.

    Args:
        facts: See `model_card.model_card`.
    """
    prompts = facts.get("prompts") or ["A person walking"]
    is_i2v = facts.get("is_i2v", False)
    size = [f"{key}={facts[key]}" for key in ("num_frames", "height", "width") if key in facts]
    for name, value in zip(_GUIDANCE, facts.get("guidance_scales", ()), strict=False):
        size.append(f"{name}={value}")
    arguments = [_quoted(prompts[0]), *size]
    if is_i2v:
        arguments = ["image", f"prompt={arguments[0]}", *size]
    call = ", ".join(arguments)
    pipeline = "WanImageToVideoPipeline" if is_i2v else "WanPipeline"
    read_image = f"image = load_image({_quoted(IMAGE)})" + _resized(facts)
    place = ", load_into_transformer_2=True" if facts.get("expert") == "low" else ""
    with_diffusers = [
        "```python",
        "import torch",
        f"from diffusers import AutoencoderKLWan, {pipeline}",
        f"from diffusers.utils import export_to_video{', load_image' if is_i2v else ''}",
        *(["from transformers import CLIPVisionModel"] if facts.get("reads_image") else []),
        "",
        f"model = {_quoted(facts['model'])}",
        'vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=torch.float32)',
        *_image_encoder(facts),
        f"pipeline = {pipeline}.from_pretrained("
        f"model, {', '.join(_fp32_parts(facts))}, dtype=torch.bfloat16)",
        f'pipeline.load_lora_weights("{FOLDER}", weight_name="{ADAPTER_NAME}"{place})',
        'pipeline.to("cuda")',
        *([read_image] if is_i2v else []),
        f"video = pipeline({call}).frames[0]",
        f'export_to_video(video, "video.mp4", fps={facts.get("fps", DEFAULT_FPS):g})',
        "```",
        "",
        "or",
        "",
    ]
    with_wanlora = [
        "```sh",
        f"wanlora sample --adapter {FOLDER}{f' --image {IMAGE}' if is_i2v else ''} "
        f"--prompt {_shell_quoted(prompts[0])}",
        "```",
    ]
    if len(prompts) > 1:
        more = [f"- {plain(prompt)}" for prompt in prompts[1:]]
        with_wanlora += ["", "More prompts:", "", *more]
    # Only wanlora can load the embedded model by its name.
    return "\n".join(with_wanlora if facts["model"] == "micro" else with_diffusers + with_wanlora)


def other_tools(facts: Mapping[str, Any]) -> str:
    """Command for other tools: ComfyUI ignores diffusers' names, and loads nothing of the file."""
    if facts["model"] == "micro":
        return ""
    return (
        "`FOLDER` is this folder or repository. ComfyUI and kohya's tools need another file; in "
        "ComfyUI this one has no effect, or part of it. Convert it:\n\n```sh\n"
        f"wanlora export --adapter {FOLDER} --format comfyui --output "
        f"{_shell_quoted(facts['name'] + '.safetensors')}\n```"
    )


def _fp32_parts(facts: Mapping[str, Any]) -> list[str]:
    """Arguments with the parts that are loaded in fp32."""
    return ["vae=vae", *(["image_encoder=image_encoder"] if facts.get("reads_image") else [])]


def _image_encoder(facts: Mapping[str, Any]) -> list[str]:
    if not facts.get("reads_image"):
        return []
    return [
        "image_encoder = CLIPVisionModel.from_pretrained("
        'model, subfolder="image_encoder", dtype=torch.float32)'
    ]


def _resized(facts: Mapping[str, Any]) -> str:
    """Call that gives an image the size of the videos, if it is known."""
    if not {"height", "width"} <= facts.keys():
        return ""
    return f".resize(({facts['width']}, {facts['height']}))"


def _quoted(text: Any) -> str:
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def _shell_quoted(text: Any) -> str:
    return "'" + str(text).replace("'", "'\\''").replace("\n", " ") + "'"


def plain(value: Any) -> str:
    """Format a value for a cell or a line of the card."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("`", "'")
