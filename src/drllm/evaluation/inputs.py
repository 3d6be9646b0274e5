"""The inputs of an evaluation: routers by seed, and static paths.

`request` has what needs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError
from drllm.evaluation.request import EvaluationRequest
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.checkpoint import check_routers, load_routers, save_routers
from drllm.models.routers.places import CONFIG_FILE, WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.paths import StaticPath
from drllm.records.codec import sha256
from drllm.records.identity import BYPASS
from drllm.records.static_paths import NamedPath
from drllm.tasks.examples import KL_REWARD, OPTIONS_REWARD
from drllm.work.listener import Listener

if TYPE_CHECKING:
    from drllm.models.workers import Workers

Routers: TypeAlias = "Path | str | RouterStack"


@dataclass(frozen=True)
class LoadedRouters:
    """Routers, and the folder that they were loaded from; None if they have none yet."""

    stack: RouterStack
    folder: Path | None = None


def list_routers(model: Any, routers: Routers | Sequence[Routers]) -> list[Routers]:
    """Return the routers to evaluate, or their folders: the model's own, or those given beside it.

    Raises:
        ConfigError: The model has its own routers, or may have them, and others are given too.
    """
    if isinstance(routers, (str, Path, RouterStack)):
        routers = [routers]
    if not isinstance(model, RoutedModel):
        return list(routers)
    if routers:
        raise ConfigError(
            "a RoutedModel is evaluated with its own routers, but other routers are given; give "
            "its base model and the routers"
        )
    if model.routers is None:
        return []
    return [model.routers]


def load_listed_routers(routers: Sequence[Routers]) -> list[LoadedRouters]:
    """Load the routers that are given as folders."""
    loaded: list[LoadedRouters] = []
    for stack_or_folder in routers:
        if isinstance(stack_or_folder, RouterStack):
            loaded.append(LoadedRouters(stack_or_folder))
        else:
            folder = Path(stack_or_folder)
            loaded.append(LoadedRouters(load_routers(folder), folder))
    return loaded


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
    """

    request: EvaluationRequest
    routers: SeedRouters
    paths: dict[str, StaticPath]


def prepare_inputs(
    request: EvaluationRequest,
    routers: Sequence[LoadedRouters],
    workers: Workers,
    output: Path,
) -> EvaluationInputs:
    """Turn the named paths into paths of the model, and save routers without a folder.

    Args:
        request: What is to be evaluated.
        routers: The routers of each seed.
        workers: The base model.
        output: The folder of the evaluation, where routers without a folder are saved.

    Raises:
        ConfigError: The same routers are given twice, or the output has other routers where they
            would be saved.
        PathError: The model can't run one of the paths.
    """
    seeds = save_seeds(routers, output)
    paths = {}
    for name, path in request.paths.items():
        if isinstance(path, NamedPath):
            paths[name] = path.path(workers.base.num_layers)
        else:
            paths[name] = path.check(workers.base.num_layers)
    return EvaluationInputs(request, seeds, paths)


def save_seeds(routers: Sequence[LoadedRouters], output: Path) -> SeedRouters:
    """Return the routers by folder; routers without a folder are saved in the output first."""
    stacks: dict[Path, RouterStack] = {}
    for number, loaded in enumerate(routers):
        if loaded.folder is not None:
            stacks[loaded.folder] = loaded.stack
        else:
            folder = output / "routers" / str(number)
            _save_or_keep(loaded.stack, folder)
            stacks[folder] = load_routers(folder)
    hashes = {folder: sha256(folder / WEIGHTS_FILE) for folder in stacks}
    if len(set(hashes.values())) < len(routers):
        raise ConfigError("the same routers are given twice; give the routers of each seed once")
    return SeedRouters(stacks, hashes)


def _save_or_keep(routers: RouterStack, folder: Path) -> None:
    """Save routers, unless the folder has them already.

    Raises ConfigError if the folder has other routers. An earlier evaluation's results name them.
    """
    with TemporaryDirectory() as temporary:
        save_routers(routers, temporary)
        file_hash = sha256(Path(temporary) / WEIGHTS_FILE)
    weights = folder / WEIGHTS_FILE
    has_weights = weights.exists()
    if has_weights and sha256(weights) != file_hash:
        raise ConfigError(
            f"{folder} has other routers, which an earlier evaluation saved there; choose another "
            f"--output-dir, or delete {folder}"
        )
    # A save that was killed leaves weights without a config.
    if not has_weights or not (folder / CONFIG_FILE).exists():
        save_routers(routers, folder)


def check_seeds(routers: SeedRouters, workers: Workers) -> None:
    """Refuse routers of another model."""
    for stack in routers.stacks.values():
        identity = workers.base.identity
        check_routers(workers.base.model, stack, identity, identity.get(BYPASS, ""))


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
