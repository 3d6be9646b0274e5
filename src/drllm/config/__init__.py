"""The settings of all stages: type, default, bounds, unit and help text.

Each field of these classes is a setting. It becomes a flag and a key of YAML files, and its value
is checked. `config.fields` says how a field is declared. This package doesn't import torch.
"""

from drllm.config.bypass import BypassConfig
from drllm.config.constants import SPLITS
from drllm.config.evaluate import TIMING, EvaluateConfig
from drllm.config.executor import ExecutorConfig
from drllm.config.gaps import GapsConfig
from drllm.config.generate import DepthConfig, GenerateConfig
from drllm.config.learn import LearnConfig
from drllm.config.model import DEVICES, ModelConfig
from drllm.config.search import STOP_RULES, SearchConfig
from drllm.config.shrink import ShrinkConfig
from drllm.config.supervise import SuperviseConfig
from drllm.config.train import TrainConfig

__all__ = [
    "DEVICES",
    "SPLITS",
    "STOP_RULES",
    "TIMING",
    "BypassConfig",
    "DepthConfig",
    "EvaluateConfig",
    "ExecutorConfig",
    "GapsConfig",
    "GenerateConfig",
    "LearnConfig",
    "ModelConfig",
    "SearchConfig",
    "ShrinkConfig",
    "SuperviseConfig",
    "TrainConfig",
]
