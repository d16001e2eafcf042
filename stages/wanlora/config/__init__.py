"""Every setting of every command: name, default, bounds, unit and description, written once.

Owns: defaults and their documentation; flags and docs are made from these models. Must not know
torch, or any library code.
"""

from wanlora.config.cache_latents import CacheLatentsConfig, StoreSettings
from wanlora.config.demo import DemoConfig
from wanlora.config.estimate import EstimateConfig
from wanlora.config.evaluate import EvaluateConfig
from wanlora.config.export import ExportConfig
from wanlora.config.inspect import InspectConfig
from wanlora.config.job import RunConfig
from wanlora.config.load import command_line, load
from wanlora.config.prepare import PrepareConfig
from wanlora.config.sample import ACTIVITY, SampleConfig
from wanlora.config.settings import DEFAULT_MODEL, Flag, Heading, Setting, Settings, settings_of
from wanlora.config.show_config import ConfigConfig
from wanlora.config.train import TrainConfig
from wanlora.config.train_sections import (
    FlowSettings,
    LoraSettings,
    OptimizerSettings,
    PreviewSettings,
    ValidationSettings,
)
from wanlora.config.verify import VerifyConfig
from wanlora.config.watch import WatchConfig

__all__ = [
    "ACTIVITY",
    "COMMANDS",
    "DEFAULT_MODEL",
    "CacheLatentsConfig",
    "ConfigConfig",
    "DemoConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "ExportConfig",
    "Flag",
    "FlowSettings",
    "Heading",
    "InspectConfig",
    "LoraSettings",
    "OptimizerSettings",
    "PrepareConfig",
    "PreviewSettings",
    "RunConfig",
    "SampleConfig",
    "Setting",
    "Settings",
    "StoreSettings",
    "TrainConfig",
    "ValidationSettings",
    "VerifyConfig",
    "WatchConfig",
    "command_line",
    "load",
    "settings_of",
]

COMMANDS: dict[str, type[Settings]] = {
    "demo": DemoConfig,
    "prepare": PrepareConfig,
    "verify": VerifyConfig,
    "cache-latents": CacheLatentsConfig,
    "inspect": InspectConfig,
    "estimate": EstimateConfig,
    "train": TrainConfig,
    "watch": WatchConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "config": ConfigConfig,
    "run": RunConfig,
}
