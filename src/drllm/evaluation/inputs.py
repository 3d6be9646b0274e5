"""The inputs of an evaluation: routers by seed, static paths, and the adapters of healed paths.

What needs no model is checked before one is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError, PathError
from drllm.evaluation.baselines.base import BASELINES
from drllm.evaluation.questions import select_tasks, without_routers
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.checkpoint import check_routers, load_routers, save_routers
from drllm.models.routers.files import WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.healed import HealedAdapter, read_adapter
from drllm.paths import StaticPath
from drllm.records.codec import sha256
from drllm.records.healed import HealedPath
from drllm.records.results import BASE, ROUTED
from drllm.records.static_paths import PathFile, read_path_list
from drllm.tasks.base import Task
from drllm.tasks.examples import KL_REWARD, OPTIONS_REWARD
from drllm.tasks.graded import pin_reward
from drllm.work.listener import Listener

if TYPE_CHECKING:
    from drllm.models.routing.lora import LoraWeights
    from drllm.models.workers import Workers

Routers: TypeAlias = "Path | str | RouterStack"
Paths: TypeAlias = "str | Sequence[str] | Mapping[str, StaticPath]"


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated, as far as it is known without the base model.

    Attributes:
        config: The settings as records have them.
        tasks: The tasks.
        routers: Routers, or their folders, the first seed's first; empty if only paths are
            evaluated.
        paths: Static paths by name; a `PathFile` becomes a path once the model is known.
        adapters: The adapters that the model already has, by name.
    """

    config: EvaluateConfig
    tasks: Sequence[Task]
    routers: Sequence[Routers]
    paths: Mapping[str, StaticPath | PathFile]
    adapters: Mapping[str, LoraWeights]

    @property
    def path_files(self) -> list[PathFile]:
        """The paths that come from files."""
        return [path for path in self.paths.values() if isinstance(path, PathFile)]


def read_request(
    model: Any,
    tasks: Task | str | Sequence[Task | str] | None,
    config: EvaluateConfig,
    routers: Routers | Sequence[Routers],
    paths: Paths | None,
) -> EvaluationRequest:
    """Check everything that needs no base model; the arguments are those of `evaluate`."""
    if isinstance(routers, (str, Path, RouterStack)):
        routers = [routers]
    is_routed = isinstance(model, RoutedModel) and model.routers is not None
    has_routers = bool(routers) or is_routed
    config = complete_settings(config, paths, has_routers=has_routers)
    tasks = select_tasks(config, tasks)
    named_paths = name_paths(paths, config)
    for path in named_paths.values():
        if isinstance(path, PathFile):
            refuse_tuning_questions(path, tasks, config)
    adapters: dict[str, LoraWeights] = {}
    if isinstance(model, RoutedModel):
        adapters = dict(model.injection.lora.all_weights())
        routers = take_routers(model, routers)
    return EvaluationRequest(config, tasks, list(routers), named_paths, adapters)


def complete_settings(
    config: EvaluateConfig, paths: Paths | None, *, has_routers: bool
) -> EvaluateConfig:
    """Return the settings as records have them, with the paths and the hash of the reward's file.

    Raises:
        ConfigError: There are neither routers nor paths, a setting only has an effect on routers
            and there are none, or time can't be measured.
    """
    if paths is not None:
        names = list(paths)
        if isinstance(paths, str):
            names = [paths]
        config = replace(config, paths=",".join(names) or None)
    if not has_routers:
        config = without_routers(config)
    if config.latency and config.executor == "ray":
        raise ConfigError(
            "--latency times the model in this process, and --executor is ray; leave one of them "
            "out"
        )
    if config.reward is not None:
        config = replace(config, reward=pin_reward(config.reward))
    return config


def name_paths(paths: Paths | None, config: EvaluateConfig) -> Mapping[str, StaticPath | PathFile]:
    """Return the static paths by name; raise PathError if a path has another system's name."""
    named_paths: Mapping[str, StaticPath | PathFile]
    if isinstance(paths, Mapping):
        named_paths = paths
    else:
        needs_names = config.max_drop is not None  # the names fix the order of its tests
        named_paths = read_path_list(config.paths or "", needs_names=needs_names)
    for name in named_paths:
        if name in (BASE, ROUTED, *BASELINES):
            raise PathError(
                f"a path is called {name!r}, as another system is; give it another name"
            )
    return named_paths


def refuse_tuning_questions(
    path_file: PathFile, tasks: Sequence[Task], config: EvaluateConfig
) -> None:
    """Raise ConfigError if a path would be evaluated on questions that it was chosen on."""
    record = path_file.record
    if record is None:
        return
    file = path_file.file
    for task in tasks:
        if task.name not in record.tasks:
            continue
        if task.name in record.divided:
            raise ConfigError(
                f"{file} was tuned on some of the questions of {task.name} that an evaluation "
                f"asks; 'drllm show {file}' shows its results on the other questions"
            )
        split = config.get_split(task.name)
        if split != "test":
            raise ConfigError(
                f"{file} was tuned on {task.name}, and --split {split} holds questions that its "
                f"paths were chosen on; evaluate them on test"
            )


def take_routers(model: RoutedModel, routers: Sequence[Routers]) -> list[RouterStack]:
    """Return the routers of a routed model; the list is empty if the model has no routers.

    Args:
        model: The routed model.
        routers: The routers that the user gave beside the model; there must be none.

    Raises:
        ConfigError: The user gave routers too.
    """
    if routers:
        raise ConfigError(
            "a RoutedModel is evaluated with its own routers, but other routers are given; give "
            "its base model and the routers"
        )
    if model.routers is None:
        return []
    return [model.routers]


@dataclass(frozen=True)
class SeedRouters:
    """The routers to evaluate by folder, the first seed's first, and the SHA-256 of their weights.

    Both mappings are empty if only paths are evaluated.
    """

    stacks: dict[Path, RouterStack]
    hashes: dict[Path, str]

    @property
    def first_folder(self) -> Path | None:
        """The folder of the first seed's routers; None without routers."""
        return next(iter(self.stacks), None)

    @property
    def first(self) -> RouterStack | None:
        """The first seed's routers, which baselines are compared with; None without routers."""
        return next(iter(self.stacks.values()), None)

    @property
    def first_hash(self) -> str | None:
        """The hash of the first seed's routers; None without routers."""
        return next(iter(self.hashes.values()), None)


@dataclass(frozen=True)
class EvaluationInputs:
    """The systems of an evaluation, checked against the base model.

    Attributes:
        request: What is to be evaluated.
        routers: The routers of each seed.
        paths: All static paths by name.
        adapters: The adapters of healed paths, which the workers put into their models.
    """

    request: EvaluationRequest
    routers: SeedRouters
    paths: dict[str, StaticPath]
    adapters: Sequence[HealedAdapter]

    @property
    def tuned_on(self) -> set[str]:
        """The tasks on whose `select` questions some of the paths were chosen."""
        tasks: set[str] = set()
        for path in self.request.path_files:
            if path.record is not None:
                tasks.update(path.record.tasks)
        return tasks


def load_inputs(request: EvaluationRequest, workers: Workers, output: Path) -> EvaluationInputs:
    """Load the routers, and turn the files of paths into paths of the model.

    Args:
        request: What is to be evaluated.
        workers: The base model.
        output: The folder of the evaluation, where routers without a folder are saved.

    Raises:
        ConfigError: The same routers are given twice.
        PathError: The model can't run one of the paths.
        RecordError: The adapter of a healed path is broken.
    """
    identity = workers.base.identity
    routers = load_seeds(request.routers, output)
    paths = {}
    for name, path in request.paths.items():
        if isinstance(path, PathFile):
            paths[name] = path.path_for(identity)
        else:
            paths[name] = path.check(identity["num_layers"])
    return EvaluationInputs(request, routers, paths, read_adapters(request, workers))


def load_seeds(routers: Sequence[Routers], output: Path) -> SeedRouters:
    """Load routers from their folders; routers without a folder are saved in the output first."""
    stacks: dict[Path, RouterStack] = {}
    for number, stack_or_folder in enumerate(routers):
        if isinstance(stack_or_folder, RouterStack):
            folder = output / "routers" / str(number)
            save_routers(stack_or_folder, folder)
        else:
            folder = Path(stack_or_folder)
        stacks[folder] = load_routers(folder)
    hashes = {folder: sha256(folder / WEIGHTS_FILE) for folder in stacks}
    if len(set(hashes.values())) < len(routers):
        raise ConfigError("the same routers are given twice; give the routers of each seed once")
    return SeedRouters(stacks, hashes)


def check_seeds(routers: SeedRouters, workers: Workers) -> None:
    """Refuse routers of another model."""
    for stack in routers.stacks.values():
        check_routers(workers.base.model, stack, workers.base.identity)


def read_adapters(request: EvaluationRequest, workers: Workers) -> list[HealedAdapter]:
    """Read the adapters of healed paths that the model doesn't have already."""
    adapters: dict[str, HealedAdapter] = {}
    for path_file in request.path_files:
        record = path_file.record
        if not isinstance(record, HealedPath) or record.adapter in request.adapters:
            continue
        if record.adapter not in adapters:
            model = workers.base.model
            adapters[record.adapter] = read_adapter(model, path_file.file, record)
    return list(adapters.values())


def note_other_prompts(routers: RouterStack, config: EvaluateConfig, listener: Listener) -> None:
    """Print a note if the evaluation's prompts are worded differently from the training's."""
    rewards = routers.config.training.get("rewards")
    if not isinstance(rewards, list):
        return
    if set(rewards) <= {KL_REWARD}:  # trained on prompts without answers, which have no wording
        return
    reward = config.reward or OPTIONS_REWARD
    if reward not in rewards:
        listener.note(
            f"the routers were trained on prompts for {', '.join(map(str, rewards))}, but the "
            f"evaluation's prompts are for {reward}; for the same prompts, give both the same "
            f"--reward"
        )
