"""Every setting of every stage; flags and YAML files come from here. Loads no torch."""

from drllm.config.settings import SPLITS as SPLITS
from drllm.config.settings import STOP_RULES as STOP_RULES
from drllm.config.settings import DepthConfig as DepthConfig
from drllm.config.settings import EvaluateConfig as EvaluateConfig
from drllm.config.settings import GenerateConfig as GenerateConfig
from drllm.config.settings import HealConfig as HealConfig
from drllm.config.settings import MenuConfig as MenuConfig
from drllm.config.settings import ModelConfig as ModelConfig
from drllm.config.settings import SearchConfig as SearchConfig
from drllm.config.settings import SuperviseConfig as SuperviseConfig
from drllm.config.settings import TrainConfig as TrainConfig
from drllm.config.settings import TuneConfig as TuneConfig
