"""Recipes: the settings of all stages in one YAML file.

Owns reading and checking them. Leaves carrying them out to `run_folder`. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drllm.cli import checks
from drllm.config import (
    EvaluateConfig,
    ModelConfig,
    SearchConfig,
    SuperviseConfig,
    TrainConfig,
)
from drllm.config.files import canonical, read_yaml, with_underscores
from drllm.config.settings import Settings, from_dict
from drllm.errors import ConfigError, unknown_name
from drllm.evaluation.questions import tasks_of
from drllm.supervision import check_settings
from drllm.tasks.base import Task

SECTIONS: dict[str, type[Settings]] = {
    "model": ModelConfig,
    "search": SearchConfig,
    "supervise": SuperviseConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings of all stages."""

    model: ModelConfig
    search: SearchConfig
    supervise: SuperviseConfig
    train: TrainConfig
    evaluate: EvaluateConfig

    def to_yaml(self) -> str:
        """Write all settings, defaults too; the text is a recipe itself."""
        values = {name: getattr(self, name).to_dict() for name in SECTIONS}
        del values["search"]["output_dir"]  # the folder that the text lies in
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def tasks(self) -> dict[str, list[Task]]:
        """Return the tasks of `search` and of `evaluate`, once all settings are known to fit.

        Raises:
            ConfigError: Settings that make no sense together or have no effect.
            TaskError: An unknown task, or no questions to be had.
        """
        tasks = {
            "search": checks.tasks_to_search(self.search),
            "evaluate": tasks_of(self.evaluate),
        }
        self.check(tasks["search"])
        return tasks

    def check(self, searched: Sequence[Task]) -> None:
        """Refuse settings of supervision and training that make no sense or have no effect.

        Args:
            searched: The tasks of `search`.

        Raises:
            ConfigError: Naming them.
        """
        check_settings(self.supervise, [task.name for task in searched])
        self.train.check_effects()
        checks.check_trackers(self.train)


def read_recipe(path: Path, folder: Path, data_dir: str | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML with the sections `model`, `search`, `supervise`, `train`, `evaluate`; each may
            be left out, and so may any of its settings.
        folder: The run folder.
        data_dir: Replaces `data_dir` of search and evaluation.

    Raises:
        ConfigError: No such file, not YAML, an unknown section or setting, a value that doesn't
            fit.
    """
    return parse_recipe(path, read_yaml(path, "a recipe"), folder, data_dir)


def parse_recipe(
    path: Path, values: Mapping[str, Any], folder: Path, data_dir: str | None = None
) -> Recipe:
    """Check what was read of a recipe; see `read_recipe`."""
    groups = {}
    for name in values:
        if name not in SECTIONS:
            raise ConfigError(f"{path}: " + unknown_name("section", name, SECTIONS))
    for name, kind in SECTIONS.items():
        section = values.get(name) or {}
        if not isinstance(section, dict):
            raise ConfigError(
                f"{path}: section {name!r} is {section!r}; give settings, written 'name: value'"
            )
        section = canonical(kind, with_underscores(section))
        if name == "search":
            if "output_dir" in section:
                raise ConfigError(
                    f"{path}: search: 'output_dir' is {section['output_dir']!r}; leave it out, a "
                    f"run writes to the folder given as --output-dir"
                )
            section["output_dir"] = str(folder)
        if data_dir is not None and name in ("search", "evaluate"):
            section["data_dir"] = data_dir
        try:
            groups[name] = from_dict(kind, section, name)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return Recipe(**groups)
