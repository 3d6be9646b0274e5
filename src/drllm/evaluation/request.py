"""What is to be evaluated: reads the settings, the tasks and the paths, and checks them.

This needs neither the base model nor its routers. This module doesn't import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError, PathError
from drllm.evaluation.baselines.base import BASELINES
from drllm.evaluation.questions import select_tasks, without_routers
from drllm.paths import StaticPath
from drllm.records.results import BASE, ROUTED
from drllm.records.static_paths import NamedPath, read_path_list
from drllm.records.supervision import read_supervision
from drllm.tasks.base import Task
from drllm.tasks.graded import pin_reward

PathSources: TypeAlias = "str | Path | Sequence[str | Path] | Mapping[str, StaticPath]"
TextPaths: TypeAlias = "str | Sequence[str] | Mapping[str, StaticPath]"


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated, besides the routers.

    Attributes:
        config: The settings as records have them.
        tasks: The tasks.
        paths: Static paths by name; a `NamedPath` becomes a path once the model is known.
    """

    config: EvaluateConfig
    tasks: Sequence[Task]
    paths: Mapping[str, StaticPath | NamedPath]

    @property
    def named_paths(self) -> list[NamedPath]:
        """The paths that become paths of the model once it is known."""
        return [path for path in self.paths.values() if isinstance(path, NamedPath)]


def read_request(
    config: EvaluateConfig,
    tasks: Task | str | Sequence[Task | str] | None = None,
    paths: PathSources | None = None,
    *,
    has_routers: bool,
) -> EvaluationRequest:
    """Read what is to be evaluated, and refuse what can't be.

    Args:
        config: The settings.
        tasks: Tasks, or names of tasks; None takes the config's tasks.
        paths: Static paths by name, or files; None takes the config's paths.
        has_routers: Whether routers are evaluated.

    Raises:
        ConfigError: Settings make no sense together, or a package is missing.
        PathError: A path has the name of another system.
        RecordError: A file of paths or targets can't be read.
        TaskError: A task is unknown, or has no questions.
    """
    paths = _write_places(paths)
    config = complete_settings(config, paths, has_routers=has_routers)
    named_paths = name_paths(paths, config)  # before the questions, which may take long to read
    refuse_wrong_targets(config)
    selected_tasks = select_tasks(config, tasks)
    return EvaluationRequest(config, selected_tasks, named_paths)


def _write_places(paths: PathSources | None) -> TextPaths | None:
    """Return paths with the places of files as texts."""
    if isinstance(paths, Path):
        return [str(paths)]  # a list, since the name of a file may have a comma
    if paths is None or isinstance(paths, (str, Mapping)):
        return paths
    return [str(place) for place in paths]


def complete_settings(
    config: EvaluateConfig, paths: TextPaths | None, *, has_routers: bool
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


def name_paths(
    paths: TextPaths | None, config: EvaluateConfig
) -> Mapping[str, StaticPath | NamedPath]:
    """Return the static paths by name; raise PathError if a path has another system's name."""
    named_paths: Mapping[str, StaticPath | NamedPath]
    if isinstance(paths, Mapping):
        named_paths = paths
    else:
        # Not from the settings if it is a list: a name of a file may have a comma.
        places = config.paths or "" if paths is None else paths
        named_paths = read_path_list(places)
    for name in named_paths:
        if name in (BASE, ROUTED, *BASELINES):
            raise PathError(
                f"a path is called {name!r}, as another system is; give it another name"
            )
    return named_paths


def refuse_wrong_targets(config: EvaluateConfig) -> None:
    """Raise RecordError if the file of the routers' targets is missing or can't be trusted."""
    if config.supervision is not None:
        read_supervision(Path(config.supervision))
