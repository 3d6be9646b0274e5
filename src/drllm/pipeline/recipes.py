"""Recipes: the settings of all stages in one YAML file.

A recipe is checked completely before a model is loaded and before anything is written.
"""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from drllm import config
from drllm.config.fields import from_dict, list_kinds
from drllm.config.files import (
    drop_empty_removed,
    normalise_settings,
    read_sections,
    read_yaml,
    with_preset,
)
from drllm.errors import ConfigError
from drllm.evaluation.questions import select_tasks, without_routers
from drllm.extras import need
from drllm.records.static_paths import PATHS_FILE, read_path
from drllm.search.questions import SearchQuestion, collect_questions
from drllm.supervision.select import check_settings
from drllm.tasks.base import Task
from drllm.training.trackers import check_trackers
from drllm.tuning.data_splits import TaskSplits, split_tasks
from drllm.tuning.heal_texts import TextSource, read_sources

ROUTING = ("search", "supervise", "train")
"""The sections and stages of routers.

A recipe trains no routers if it has a section of a static path and none of these sections.
"""
PATHS: dict[str, Any] = {"tune": config.TuneConfig, "heal": config.HealConfig}
"""The sections and stages of a static path. A stage runs only if the recipe has its section."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of all stages.

    Without `tune`, no static path is searched; without `heal`, no path is healed. With `tune`, the
    `path` of `heal` is the name of a path that `tune` will find.
    """

    model: config.ModelConfig = dataclasses.field(default_factory=config.ModelConfig)
    search: config.SearchConfig = dataclasses.field(default_factory=config.SearchConfig)
    supervise: config.SuperviseConfig = dataclasses.field(default_factory=config.SuperviseConfig)
    train: config.TrainConfig = dataclasses.field(default_factory=config.TrainConfig)
    tune: config.TuneConfig | None = None
    heal: config.HealConfig | None = None
    evaluate: config.EvaluateConfig = dataclasses.field(default_factory=config.EvaluateConfig)
    has_routers: bool = True

    def to_yaml(self) -> str:
        """Write all settings, including defaults, as the text of a recipe."""
        values = {name: getattr(self, name).to_dict() for name in SECTIONS if self.runs(name)}
        if "search" in values:
            del values["search"]["output_dir"]  # the folder in which the recipe lies
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def runs(self, name: str) -> bool:
        """Tell whether the recipe has a section or a stage with this name."""
        if name in ROUTING:
            return self.has_routers
        return getattr(self, name, True) is not None

    @cached_property
    def questions(self) -> list[SearchQuestion]:
        """The questions of the search; reading them raises the same errors as `check`."""
        return collect_questions(None, self.search)

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks of the evaluation; reading them raises the same errors as `check`."""
        return select_tasks(self.evaluate)

    @cached_property
    def tuned(self) -> list[TaskSplits]:
        """The tasks of tuning with their questions; reading them raises the errors of `check`."""
        return split_tasks(self.tune or config.TuneConfig())

    @cached_property
    def healed(self) -> list[TextSource]:
        """The texts that a path is healed on; reading them raises the same errors as `check`."""
        return read_sources(self.heal or config.HealConfig())

    def check(self) -> None:
        """Refuse wrong settings, settings without effect, and a missing package."""
        need("eval,report", "a run")
        self._check_tasks()
        _ = self.tasks  # reading the tasks checks them
        if self.has_routers:
            self._check_routers()
        else:
            paths = self.evaluate.paths or PATHS_FILE  # by default the paths of this run
            without_routers(dataclasses.replace(self.evaluate, paths=paths))
        if self.tune is not None:
            self._check_tuning()
        if self.heal is not None:
            self._check_healing(self.heal)

    def _check_routers(self) -> None:
        searched = dict.fromkeys(question.task for question in self.questions)
        check_settings(self.supervise, list(searched), self.search)
        self.train.check_effects()
        check_trackers(self.train.trackers)

    def _check_tuning(self) -> None:
        _ = self.tuned
        if self.evaluate.max_drop is not None and self.evaluate.paths is None:
            raise ConfigError(
                f"evaluate: 'max_drop' is {self.evaluate.max_drop:g}, which tests paths in an "
                f"order fixed beforehand, but the paths of tune have no names yet; leave it out, "
                f"then 'drllm evaluate --paths RUN/paths.json:NAME --max-drop N'"
            )

    def _check_healing(self, heal: config.HealConfig) -> None:
        _ = self.healed
        if self.tune is None:
            read_path(heal.require_path())
        elif heal.path is None:
            raise ConfigError(
                "heal: no path is named; name one that tune will find, for example 'path: skip1'"
            )

    def _check_tasks(self) -> None:
        """Refuse a section that needs a task and names none."""
        names = {"evaluate": self.evaluate.tasks}
        if self.has_routers:
            names["search"] = self.search.dataset
        if self.tune is not None:
            names["tune"] = self.tune.tasks
        for section, tasks in names.items():
            if tasks is None:
                raise ConfigError(
                    f"{section}: no task is given; add one to the recipe's section {section}, for "
                    f"example 'tasks: questions.jsonl'"
                )


SECTIONS: dict[str, Any] = {
    section.name: PATHS.get(section.name, section.default_factory)
    for section in dataclasses.fields(Recipe)
    if section.name != "has_routers"
}
"""The class of the settings in each section of a recipe, by the name of the section."""


def read_recipe(path: Path, data_dir: str | None = None) -> Recipe:
    """Read a recipe; `data_dir` replaces the `data_dir` of every section with questions."""
    values = with_preset(path, read_yaml(path, "a recipe"))
    sections = read_sections(path, values, SECTIONS)
    groups: dict[str, Any] = {}
    names_paths = any(name in sections for name in PATHS)
    names_routers = any(name in sections for name in ROUTING)
    groups["has_routers"] = names_routers or not names_paths
    for name, kind in SECTIONS.items():
        if name in PATHS and name not in sections:
            continue
        section = normalise_settings(kind, sections.get(name, {}))
        section = drop_empty_removed(section, list_kinds(kind))
        if name == "search" and "output_dir" in section:
            raise ConfigError(
                f"{path}: search: 'output_dir' is {section['output_dir']!r}; leave it out, a run "
                f"writes to the folder given as --output-dir"
            )
        if data_dir is not None and name in ("search", "evaluate", *PATHS):
            section["data_dir"] = data_dir
        try:
            groups[name] = from_dict(kind, section, name)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return Recipe(**groups)
