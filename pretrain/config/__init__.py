"""The configuration of a run: typed, validated, and read from YAML files and overrides.

Every setting is a field of a dataclass in :mod:`~pretrain.config.schema`, with its meaning, default
and allowed values. A file contains the settings that differ from the defaults, or from the file
that it names as its ``base``; ``key.sub=value`` on the command line takes precedence.
"""

from pretrain.config.loading import escape_path, from_dict, load, to_dict, with_overrides
from pretrain.config.reference import describe
from pretrain.config.schema import (
    Config,
    DataConfig,
    EncoderProcessConfig,
    FaultConfig,
    ImageConfig,
    LanguageConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputeConfig,
    RopeScalingConfig,
    SourceConfig,
    VisionConfig,
    WandbConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "EncoderProcessConfig",
    "FaultConfig",
    "ImageConfig",
    "LanguageConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RecomputeConfig",
    "RopeScalingConfig",
    "SourceConfig",
    "VisionConfig",
    "WandbConfig",
    "describe",
    "escape_path",
    "from_dict",
    "load",
    "to_dict",
    "with_overrides",
]
