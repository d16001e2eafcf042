"""Find the settings that a user probably meant by an unknown name.

Owns: names of settings in other trainers. Must not know: the command line.
"""

import difflib
import re

from wanlora.config.settings import Setting, Settings, settings_of

MAX_SHOWN = 3

OTHER_TRAINERS = {
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "adam_weight_decay": "optimizer.weight_decay",
    "blocks_to_swap": "stream_blocks",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "checkpointing_steps": "save_steps",
    "checkpoints_total_limit": "keep_checkpoints",
    "data_root": "cache",
    "dataset_config": "cache",
    "dim": "lora.rank",
    "discrete_flow_shift": "flow.shift",
    "epochs": "num_epochs",
    "flow_shift": "shift",
    "frame_rate": "fps",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_checkpointing": "activations",
    "gradient_clipping": "optimizer.max_grad_norm",
    "guidance": "guidance_scale",
    "infer_steps": "steps",
    "instance_data_dir": "sources",
    "instance_data_root": "sources",
    "iterations": "max_steps",
    "log_with": "trackers",
    "lora_dim": "lora.rank",
    "lora_path": "adapter",
    "lora_weight": "adapter",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "max_train_epochs": "num_epochs",
    "max_train_steps": "max_steps",
    "micro_batch_size_per_gpu": "batch_size",
    "mixed_precision": "dtype",
    "network_alpha": "lora.alpha",
    "network_dim": "lora.rank",
    "network_weights": "init_adapter",
    "num_inference_steps": "steps",
    "num_train_epochs": "num_epochs",
    "optimizer_type": "optimizer.name",
    "precision": "dtype",
    "pretrained_model_name_or_path": "model",
    "prodigy": "optimizer.name",
    "r": "lora.rank",
    "report_to": "trackers",
    "resume_from_checkpoint": "resume",
    "sample_every_n_steps": "previews.every",
    "sample_prompts": "previews.prompts",
    "save_every_n_epochs": "save_every_epoch",
    "save_every_n_steps": "save_steps",
    "sdpa": "attention",
    "steps": "max_steps",
    "target_modules": "lora.targets",
    "timestep_sampling": "flow.sampler",
    "train_batch_size": "batch_size",
    "train_data_dir": "sources",
    "trigger_word": "caption_prefix",
    "validation_epochs": "previews.every",
    "validation_prompt": "previews.prompts",
    "validation_prompts": "previews.prompts",
    "validation_steps": "previews.every",
    "video_length": "num_frames",
    "weighting_scheme": "flow.sampler",
    "xformers": "attention",
}
"""Names in other trainers (diffusers' scripts, kohya's, diffusion-pipe, ai-toolkit) to settings."""


def nearest(model: type[Settings], text: str) -> list[Setting]:
    """Find the settings of a command that a name probably means, likeliest first.

    Args:
        model: The command's settings.
        text: Name of an option or a setting, for example --lora-rank or lora.rnak.
    """
    key = re.sub(r"[-.]+", "_", text.strip("-")).lower()
    known = list(settings_of(model))
    wanted = OTHER_TRAINERS.get(key, "")
    for is_meant in (
        lambda name: name == wanted,
        lambda name: _joined(name) == key,
        lambda name: _leaf(name) == key,
        lambda name: bool(wanted) and _leaf(name) == _leaf(wanted),
        lambda name: name.partition(".")[0] == key,
        lambda name: len(key) > 2 and f"_{key}_" in f"_{_joined(name)}_",
    ):
        if found := [setting for setting in known if is_meant(setting.name)]:
            return found[:MAX_SHOWN]
    by_name = {form: each for each in known for form in (_leaf(each.name), _joined(each.name))}
    by_name |= {name.strip("-").replace("-", "_"): each for each in known for name in each.options}
    close = difflib.get_close_matches(key, by_name, n=MAX_SHOWN, cutoff=0.7)
    return list({by_name[form].name: by_name[form] for form in close}.values())


def _joined(name: str) -> str:
    return name.replace(".", "_")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
