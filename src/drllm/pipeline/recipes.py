"""Recipes: the settings of all stages in one YAML file.

A recipe is checked completely before a model is loaded and before anything is written.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from drllm import config
from drllm.config.fields import Settings, from_dict
from drllm.config.files import (
    normalise_settings,
    read_sections,
    read_yaml,
    refuse_code,
    with_preset,
)
from drllm.errors import ConfigError
from drllm.evaluation.questions import select_tasks
from drllm.evaluation.request import complete_settings, name_paths
from drllm.extras import need
from drllm.search.questions import SearchQuestion, collect_questions
from drllm.supervision.select import check_settings
from drllm.tasks.base import Task
from drllm.training.trackers import check_trackers

ROUTING = ("search", "supervise", "train")
"""The sections that train routers; each runs the stage of its name.

A recipe trains routers unless it has none of these and its evaluation names paths.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of all stages.

    Attributes:
        has_routers: Whether routers are trained.
    """

    model: config.ModelConfig = dataclasses.field(default_factory=config.ModelConfig)
    search: config.SearchConfig = dataclasses.field(default_factory=config.SearchConfig)
    supervise: config.SuperviseConfig = dataclasses.field(default_factory=config.SuperviseConfig)
    train: config.TrainConfig = dataclasses.field(default_factory=config.TrainConfig)
    evaluate: config.EvaluateConfig = dataclasses.field(default_factory=config.EvaluateConfig)
    has_routers: bool = True

    def to_yaml(self) -> str:
        """Write all settings, including defaults, as the text of a recipe."""
        values = {name: getattr(self, name).to_dict() for name in SECTIONS if self.includes(name)}
        if "search" in values:
            del values["search"]["output_dir"]  # the folder that the recipe is written to
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def includes(self, name: str) -> bool:
        """Tell whether the recipe includes the section or the stage of this name."""
        if name in ROUTING:
            return self.has_routers
        return True  # every recipe has a model, an evaluation and a report

    @cached_property
    def questions(self) -> list[SearchQuestion]:
        """The questions of the search. The first access reads them and may raise an error."""
        return collect_questions(None, self.search)

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks of the evaluation. The first access reads them and may raise an error."""
        return select_tasks(self.evaluate)

    def check(self) -> None:
        """Refuse wrong settings, settings without effect, wrong files and missing packages."""
        need("eval,report", "a run")
        self._check_tasks_are_named()
        _ = self.tasks  # reads and checks them
        self._check_evaluation()
        if self.has_routers:
            self._check_routers()

    def _check_evaluation(self) -> None:
        """Check the section `evaluate`, and the static paths that it names."""
        complete_settings(self.evaluate, None, has_routers=self.has_routers)
        name_paths(None, self.evaluate)

    def _check_routers(self) -> None:
        """Check the sections that train routers."""
        tasks = dict.fromkeys(question.task for question in self.questions)  # each task once
        check_settings(self.supervise, list(tasks), self.search)
        self.train.check_effects()
        check_trackers(self.train.trackers)

    def _check_tasks_are_named(self) -> None:
        """Refuse a section that needs a task but doesn't name one."""
        names = {"evaluate": self.evaluate.tasks}
        if self.has_routers:
            names["search"] = self.search.dataset
        for section, tasks in names.items():
            if tasks is None:
                raise ConfigError(
                    f"{section}: no task is given; add one to the recipe's section {section}, for "
                    f"example 'tasks: questions.jsonl', or 'tasks: builtin_facts' for a first try"
                )


SECTIONS: dict[str, Any] = {
    "model": config.ModelConfig,
    "search": config.SearchConfig,
    "supervise": config.SuperviseConfig,
    "train": config.TrainConfig,
    "evaluate": config.EvaluateConfig,
}
"""The class of the settings in each section of a recipe, by the name of the section."""
SECTIONS_WITH_QUESTIONS = ("search", "evaluate")


def read_recipe(path: Path, data_dir: str | None = None, *, trusts_code: bool = False) -> Recipe:
    """Read a recipe.

    Args:
        path: The YAML file.
        data_dir: Replaces the `data_dir` of every section with questions; None leaves them.
        trusts_code: Whether the recipe may let code run: a model's own, a task file's, or the
            Python file of a reward.

    Raises:
        ConfigError: The file isn't a recipe, a setting is unknown or wrong, or the recipe lets code
            run without being trusted.
    """
    values = with_preset(path, read_yaml(path, "a recipe"))
    sections = read_sections(path, values, SECTIONS)
    names_paths = bool(sections.get("evaluate", {}).get("paths"))
    has_router_section = any(name in sections for name in ROUTING)
    groups: dict[str, Any] = {"has_routers": has_router_section or not names_paths}
    try:
        for name, kind in SECTIONS.items():
            groups[name] = _make_group(name, kind, sections.get(name, {}), data_dir)
            if not trusts_code:
                remedy = "read the recipe and what it names, then give --trust-code"
                refuse_code(groups[name].to_dict(), remedy, section=name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return Recipe(**groups)


def _make_group(
    name: str, kind: type[Settings], values: Mapping[str, Any], data_dir: str | None
) -> Settings:
    """Make the settings of a section from the values in the recipe."""
    settings = normalise_settings(kind, values)
    if name == "search" and "output_dir" in settings:
        raise ConfigError(
            f"search: 'output_dir' is {settings['output_dir']!r}; leave it out, a run writes to "
            f"the folder given as --output-dir"
        )
    if data_dir is not None and name in SECTIONS_WITH_QUESTIONS:
        settings["data_dir"] = data_dir
    return from_dict(kind, settings, name)
