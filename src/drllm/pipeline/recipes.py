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
from drllm.config.fields import Settings, from_dict, list_kinds
from drllm.config.files import (
    drop_null_of_removed,
    normalise_settings,
    read_sections,
    read_yaml,
    refuse_code,
    with_preset,
)
from drllm.config.heal import NO_REPAIR
from drllm.errors import ConfigError
from drllm.evaluation.questions import select_tasks
from drllm.evaluation.request import complete_settings, name_paths, refuse_tuning_questions
from drllm.extras import need
from drllm.records.static_paths import PATHS_FILE, PathFile, load_path
from drllm.search.questions import SearchQuestion, collect_questions
from drllm.supervision.select import check_settings
from drllm.tasks.base import Task
from drllm.training.trackers import check_trackers
from drllm.tuning.calibration import read_calibration
from drllm.tuning.data_splits import TaskSplits, split_tasks
from drllm.tuning.heal_texts import TextSource, read_sources

ROUTING = ("search", "supervise", "train")
"""The sections that train routers; each runs the stage of its name.

A recipe trains routers unless it has a section in `PATHS` and none of these.
"""
PATHS: dict[str, Any] = {"tune": config.TuneConfig, "heal": config.HealConfig}
"""The sections that make a static path, and the class of their settings.

Each runs the stage of its name. Without the section, the stage doesn't run.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of all stages.

    Attributes:
        tune: None if no static path is searched.
        heal: None if no path is healed. With `tune`, the setting `path` is the name of a path that
            `tune` will find.
        has_routers: Whether routers are trained.
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
        values = {name: getattr(self, name).to_dict() for name in SECTIONS if self.includes(name)}
        if "search" in values:
            del values["search"]["output_dir"]  # the folder that the recipe is written to
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def includes(self, name: str) -> bool:
        """Tell whether the recipe includes the section or the stage of this name."""
        if name in ROUTING:
            return self.has_routers
        if name in PATHS:
            return getattr(self, name) is not None
        return True  # every recipe has a model, an evaluation and a report

    @cached_property
    def questions(self) -> list[SearchQuestion]:
        """The questions of the search. The first access reads them and may raise an error."""
        return collect_questions(None, self.search)

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks of the evaluation. The first access reads them and may raise an error."""
        return select_tasks(self.evaluate)

    @cached_property
    def tuning_tasks(self) -> list[TaskSplits]:
        """The tasks and questions of `tune`. The first access reads them and may raise an error."""
        return split_tasks(self.tune or config.TuneConfig())

    @cached_property
    def tuning_texts(self) -> list[TextSource]:
        """The texts that `tune` repairs paths with; none if it doesn't repair paths.

        The first access reads them and may raise an error.
        """
        settings = self.tune or config.TuneConfig()
        if settings.repair == NO_REPAIR:
            return []
        return read_calibration(settings, self.tuning_tasks)

    @cached_property
    def healing_texts(self) -> list[TextSource]:
        """The texts of `heal`. The first access reads them and may raise an error."""
        return read_sources(self.heal or config.HealConfig())

    def check(self) -> None:
        """Refuse wrong settings, settings without effect, wrong files and missing packages."""
        need("eval,report", "a run")
        self._check_tasks_are_named()
        _ = self.tasks  # reads and checks them
        self._check_evaluation()
        if self.has_routers:
            self._check_routers()
        if self.tune is not None:
            self._check_tuning()
        if self.heal is not None:
            self._check_healing(self.heal)

    def _check_evaluation(self) -> None:
        """Check the section `evaluate`, and the static paths that it names."""
        makes_paths = self.tune is not None or self.heal is not None
        settings = self.evaluate
        if settings.paths is None and makes_paths:
            settings = dataclasses.replace(settings, paths=PATHS_FILE)  # those of this run
        complete_settings(settings, None, has_routers=self.has_routers)
        if makes_paths:  # a named path may be one that this run makes
            return
        for path in name_paths(None, settings).values():
            if isinstance(path, PathFile):
                refuse_tuning_questions(path, self.tasks, settings)

    def _check_routers(self) -> None:
        """Check the sections that train routers."""
        tasks = dict.fromkeys(question.task for question in self.questions)  # each task once
        check_settings(self.supervise, list(tasks), self.search)
        self.train.check_effects()
        check_trackers(self.train.trackers)

    def _check_tuning(self) -> None:
        """Check the section `tune`, and that the evaluation fits it."""
        _ = self.tuning_tasks  # reads and checks them
        _ = self.tuning_texts
        if self.evaluate.paths is None:  # the paths of this run are evaluated
            self._check_tuned_tasks()
        if self.evaluate.max_drop is not None and self.evaluate.paths is None:
            raise ConfigError(
                f"evaluate: 'max_drop' is {self.evaluate.max_drop:g}, which tests paths in an "
                f"order fixed beforehand, but the paths of tune have no names yet; leave it out, "
                f"and after the run give 'drllm evaluate --paths RUN/paths.json:NAME --max-drop N'"
            )

    def _check_tuned_tasks(self) -> None:
        """Refuse to evaluate paths on questions that `tune` chooses them on."""
        names = [task.name for task in self.tasks]
        for splits in self.tuning_tasks:
            name = splits.task.name
            if name not in names:
                continue
            if splits.is_divided:
                raise ConfigError(
                    f"evaluate: tune divides the questions of {name}, and chooses paths on some of "
                    f"them; evaluate on another task, since tune reports the others"
                )
            split = self.evaluate.get_split(name)
            if split != "test":
                raise ConfigError(
                    f"evaluate: tune chooses paths on questions of {name}, and its split is "
                    f"{split!r}; evaluate it on test"
                )

    def _check_healing(self, heal: config.HealConfig) -> None:
        """Check the section `heal`, and that it names a path."""
        heal.check()
        _ = self.healing_texts  # reads and checks them
        if self.tune is None:
            load_path(heal.require_path())
        elif heal.path is None:
            raise ConfigError(
                "heal: no path is named; name one that tune will find, for example 'path: skip1'"
            )
        elif ":" in heal.path:
            raise ConfigError(
                f"heal: 'path' is {heal.path!r}, but tune finds the paths of this run; give the "
                f"name of the path alone, for example 'path: skip1'"
            )

    def _check_tasks_are_named(self) -> None:
        """Refuse a section that needs a task but doesn't name one."""
        names = {"evaluate": self.evaluate.tasks}
        if self.has_routers:
            names["search"] = self.search.dataset
        if self.tune is not None:
            names["tune"] = self.tune.tasks
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
    **PATHS,
    "evaluate": config.EvaluateConfig,
}
"""The class of the settings in each section of a recipe, by the name of the section."""
SECTIONS_WITH_QUESTIONS = ("search", "evaluate", *PATHS)


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
    has_path_section = any(name in sections for name in PATHS)
    has_router_section = any(name in sections for name in ROUTING)
    groups: dict[str, Any] = {"has_routers": has_router_section or not has_path_section}
    for name, kind in SECTIONS.items():
        if name in PATHS and name not in sections:
            continue
        try:
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
    settings = drop_null_of_removed(settings, list_kinds(kind))
    if name == "search" and "output_dir" in settings:
        raise ConfigError(
            f"search: 'output_dir' is {settings['output_dir']!r}; leave it out, a run writes to "
            f"the folder given as --output-dir"
        )
    if data_dir is not None and name in SECTIONS_WITH_QUESTIONS:
        settings["data_dir"] = data_dir
    return from_dict(kind, settings, name)
