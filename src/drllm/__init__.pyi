"""The public names, for type checkers and editors; `__init__.py` has the same list."""

from drllm.config import DepthConfig as DepthConfig
from drllm.config import EvaluateConfig as EvaluateConfig
from drllm.config import HealConfig as HealConfig
from drllm.config import ModelConfig as ModelConfig
from drllm.config import SearchConfig as SearchConfig
from drllm.config import SuperviseConfig as SuperviseConfig
from drllm.config import TrainConfig as TrainConfig
from drllm.config import TuneConfig as TuneConfig
from drllm.errors import ArchitectureError as ArchitectureError
from drllm.errors import CheckpointError as CheckpointError
from drllm.errors import ConfigError as ConfigError
from drllm.errors import DrllmError as DrllmError
from drllm.errors import ModelError as ModelError
from drllm.errors import PathError as PathError
from drllm.errors import RecordError as RecordError
from drllm.errors import RoutingError as RoutingError
from drllm.errors import TaskError as TaskError
from drllm.evaluation.run import evaluate as evaluate
from drllm.models.base.load import load as load
from drllm.models.routers.config import RouterConfig as RouterConfig
from drllm.models.routers.stack import RouterStack as RouterStack
from drllm.models.routing.policies import POLICIES as POLICIES
from drllm.models.routing.policies import FixedPolicy as FixedPolicy
from drllm.models.routing.policies import FullPolicy as FullPolicy
from drllm.models.routing.policies import Policy as Policy
from drllm.models.routing.policies import PromptView as PromptView
from drllm.models.routing.policies import RouterPolicy as RouterPolicy
from drllm.models.routing.routed_model import RoutedModel as RoutedModel
from drllm.models.routing.routed_model import attach as attach
from drllm.models.routing.routed_model import detach as detach
from drllm.paths import StaticPath as StaticPath
from drllm.paths import sketch as sketch
from drllm.paths import to_decisions as to_decisions
from drllm.paths import to_path as to_path
from drllm.records.static_paths import load_path as load_path
from drllm.reporting.stage import report as report
from drllm.search.run import search_paths as search_paths
from drllm.supervision.select import supervise as supervise
from drllm.tasks.registry import get_task as get_task
from drllm.training.stage import train as train
from drllm.tuning.heal import heal as heal
from drllm.tuning.run import tune as tune

__version__: str
