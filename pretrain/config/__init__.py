"""The configuration of a run: typed, validated, and read from YAML files and overrides.

Every setting is a field of a dataclass in :mod:`~pretrain.config.schema`, with its meaning, default
and allowed values. A file contains the settings that differ from the defaults, or from the file
that it names as its ``base``; ``key.sub=value`` on the command line takes precedence.
"""

from pretrain.config.loading import drop_without_effect as drop_without_effect
from pretrain.config.loading import escape_path as escape_path
from pretrain.config.loading import from_dict as from_dict
from pretrain.config.loading import load as load
from pretrain.config.loading import load_as as load_as
from pretrain.config.loading import merge as merge
from pretrain.config.loading import sources_yaml as sources_yaml
from pretrain.config.loading import to_dict as to_dict
from pretrain.config.loading import with_overrides as with_overrides
from pretrain.config.rules import describe as describe
from pretrain.config.schema import Config as Config
from pretrain.config.schema import DataConfig as DataConfig
from pretrain.config.schema import EncoderProcessConfig as EncoderProcessConfig
from pretrain.config.schema import FaultConfig as FaultConfig
from pretrain.config.schema import ImageConfig as ImageConfig
from pretrain.config.schema import KernelsSetting as KernelsSetting
from pretrain.config.schema import LanguageConfig as LanguageConfig
from pretrain.config.schema import OptimizerConfig as OptimizerConfig
from pretrain.config.schema import ParallelConfig as ParallelConfig
from pretrain.config.schema import RecomputeConfig as RecomputeConfig
from pretrain.config.schema import RopeScalingConfig as RopeScalingConfig
from pretrain.config.schema import SourceConfig as SourceConfig
from pretrain.config.schema import VisionConfig as VisionConfig
from pretrain.config.schema import WandbConfig as WandbConfig
