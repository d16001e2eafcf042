"""Sections of the settings of `wanlora train`; `wanlora estimate` shares three of them.

Owns: the adapter, the noise levels, the optimizer, validation and previews.
"""

from pathlib import Path
from typing import Literal

from wanlora.config.settings import Sampler, Settings, setting
from wanlora.errors import ConfigError
from wanlora.wan.variants import Variant


class LoraSettings(Settings):
    """The adapter: size, scale and adapted modules."""

    rank: int = setting(32, "Rank of the adapter.", ge=1, flag="Adapter")
    alpha: float | None = setting(
        None, "The adapter is scaled by alpha/rank.", gt=0, flag="Adapter", unset="the rank"
    )
    targets: str | tuple[str, ...] = setting(
        "attention+ffn",
        "Modules to adapt: attention, attention+ffn or all-linear; a regular expression that "
        "matches whole module names; or a list of name suffixes, each of which must match.",
        flag="Adapter",
    )
    rslora: bool = setting(False, "Scale by alpha/sqrt(rank) instead of alpha/rank.")
    dora: bool = setting(False, "Train magnitudes in addition to directions (DoRA).")


class FlowSettings(Settings):
    """Noise levels to train on: their distribution and weight."""

    sampler: Sampler = setting("logit_normal", "Distribution of sigma.")
    shift: float | None = setting(
        None,
        "Shift of sigma.",
        gt=0,
        unset="the shift of the variant for the size of most clips: 3 at 480p and 5 at 720p for "
        "Wan2.1, 12 for Wan2.2 (image to video: 5)",
    )
    weighting: Literal["none", "bsmntw", "sigma_sqrt"] = setting(
        "none", "Weight of the loss as a function of sigma."
    )


class OptimizerSettings(Settings):
    """The optimizer of the float32 master weights."""

    name: Literal["adamw", "prodigy"] = setting(
        "adamw",
        "adamw, or prodigy (pip install 'wanlora[prodigy]'). prodigy finds the learning rate "
        "itself; each step then waits for a value from the GPU.",
    )
    beta1: float = setting(0.9, "Decay rate of the first moment.", ge=0, lt=1)
    beta2: float = setting(0.99, "Decay rate of the second moment.", ge=0, lt=1)
    eps: float = setting(1e-8, "Term added to the denominator.", gt=0)
    weight_decay: float = setting(0.01, "Decoupled weight decay.", ge=0)
    max_grad_norm: float = setting(
        1.0, "Clip the global gradient norm to this in each step; 0 = never.", ge=0
    )
    schedule: Literal["constant", "cosine", "linear"] = setting(
        "constant", "Learning rate after the warm-up."
    )
    warmup_steps: int | None = setting(
        None,
        "Steps of linear warm-up. A resumed run keeps its own number.",
        ge=0,
        unset="a tenth of the run, at most 100",
    )


class ValidationSettings(Settings):
    """Loss on fixed clips, noise levels and noise, compared with the base model."""

    every: int = setting(500, "Steps between validations, plus one at the end; 0 = never.", ge=0)
    split: str = setting("val", "Split of the view to validate on.")
    num_clips: int = setting(16, "Number of held-out clips, and as many training clips.", ge=1)
    num_sigmas: int = setting(8, "Number of noise levels per clip.", ge=1)
    train_clips: bool = setting(True, "Validate on training clips too, to detect overfitting.")
    patience: int = setting(
        0, "Stop after this many validations without a new best; 0 = never.", ge=0
    )


class PreviewSettings(Settings):
    """Latents denoised during training, shown as approximate pictures; no VAE is loaded."""

    prompts: tuple[str, ...] = setting(
        (),
        "Prompt of a preview; repeat for several. A prompt that is not in the cache is encoded "
        "before training starts, with the text encoder of the cache. Rejected for an expert of a "
        "model with two transformers, whose videos need both.",
        flag="Previews",
        names=("--preview-prompt",),
    )
    every: int | None = setting(
        None,
        "Steps between previews, plus one preview before the first step and one after the last; "
        "0 = never.",
        ge=0,
        flag="Previews",
        names=("--preview-every",),
        unset="with --preview-prompt a quarter of the run, at most 500; otherwise never",
    )
    num_prompts: int = setting(
        2,
        "Number of prompts to show without --preview-prompt: the validation prompts of the view, "
        "otherwise captions of held-out clips.",
        ge=1,
    )
    steps: int = setting(20, "Denoising steps.", ge=1)

    def period(self, end_step: int) -> int:
        """Steps between previews of a run of `end_step` steps; 0 = never."""
        if self.every is not None:
            return self.every
        return min(500, -(-end_step // 4)) if self.prompts else 0

    def check_model(self, variant: Variant, *, adapter: Path | str) -> None:
        """Refuse previews of an expert: a video needs both transformers, and a run loads one.

        Args:
            variant: Variant of the model.
            adapter: Folder of the run, for the command that makes videos.

        Raises:
            ConfigError: Previews are set.
        """
        if variant.boundary is not None and self.period(1):
            raise ConfigError(
                f"previews are set, but a video needs both transformers of {variant.name}, and a "
                "run loads one. Leave out --preview-prompt and --preview-every, and make videos "
                f"from the run's adapter with: wanlora sample --adapter {adapter}"
            )
