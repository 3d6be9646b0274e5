"""Selects the tasks of an evaluation, the questions to report and the questions to fit on.

Depths and baselines are fitted on questions that aren't reported. All checks happen before a model
is loaded. This module doesn't import torch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drllm.config import TIMING, EvaluateConfig
from drllm.config.fields import require_tasks, to_flag
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.evaluation.baselines.base import (
    BASELINES,
    QUESTIONS,
    check_baseline_settings,
    read_curve,
    select_baselines,
)
from drllm.extras import need
from drllm.records.results import (
    EVALUATION_SCHEMA,
    LATENCY_FILE,
    list_possible_results,
    read_schema,
)
from drllm.statistics.verdicts import FEWEST_TEXTS
from drllm.tasks.base import Task, load_questions
from drllm.tasks.examples import Example
from drllm.tasks.graded import GradedTask
from drllm.tasks.registry import get_tasks
from drllm.tasks.rewards import check_installed


def select_tasks(
    config: EvaluateConfig, tasks: Task | str | Sequence[Task | str] | None = None
) -> list[Task]:
    """Return the tasks to evaluate, after checking them and the settings.

    Args:
        config: The settings.
        tasks: Tasks, or names of tasks; None takes the config's tasks.

    Raises:
        ConfigError: Settings make no sense together, or a package is missing.
        TaskError: A task is unknown, or has no questions.
    """
    need("eval", "an evaluation")
    if tasks is None:
        tasks = require_tasks(config.tasks)
    selected = _list_tasks(tasks, config)
    names = [task.name for task in selected]
    check_baseline_settings(config)
    _check_max_drop(config, selected)
    _check_names(names)
    for task in selected:
        _check_questions(task, config)
    if needs_fitting(config):
        for task in selected:
            _read_questions(task, choose_fitting_split(config), config)
    elif config.num_calibration is not None:
        raise ConfigError(
            f"--num-calibration {config.num_calibration} has no effect on the baselines "
            f"{config.baselines} without --curve; leave it out, or give --curve or baselines that "
            f"are fitted"
        )
    return selected


def _check_names(names: Sequence[str]) -> None:
    """Refuse tasks whose results would have another file's name."""
    if Path(LATENCY_FILE).stem in names:
        raise ConfigError(
            f"a task is called {Path(LATENCY_FILE).stem!r}, but {LATENCY_FILE} holds the measured "
            f"times; rename its file"
        )
    for name in names:
        if not name or name.endswith(".manifest"):
            raise ConfigError(
                f"a task is called {name!r}, and its results would be in a file of another kind, "
                f"{name}.json; rename its file"
            )


def _check_questions(task: Task, config: EvaluateConfig) -> None:
    """Refuse a task that has no answers or no questions, or whose reward lacks a package."""
    task.check_answers()
    is_graded_as_in_search = task.harness is None and task.prompt_format is not None
    if is_graded_as_in_search:
        default_reward = task.check_reward(None)
        check_installed(default_reward)
    _read_questions(task, config.split, config)


def _check_max_drop(config: EvaluateConfig, tasks: Sequence[Task]) -> None:
    """Refuse `--max-drop` on questions of another split than `test`, and on too few texts."""
    if config.max_drop is None:
        return
    for task in tasks:
        split = config.split
        if split != "test":
            raise ConfigError(
                f"--max-drop {config.max_drop:g} needs the questions of test, but {task.name} is "
                f"evaluated on {split}; evaluate it on test, or leave out --max-drop"
            )
    if config.max_loss_increase is not None and config.num_texts < FEWEST_TEXTS:
        raise ConfigError(
            f"--num-texts {config.num_texts} is too small for --max-loss-increase "
            f"{config.max_loss_increase:g}; give at least {FEWEST_TEXTS}"
        )


def _read_questions(task: Task, split: str, config: EvaluateConfig) -> list[Example]:
    """Return the questions of a split.

    Raises:
        TaskError: The split has no questions, or the task has only questions of `test`.
    """
    if split != "test" and task.has_only_test:
        raise TaskError(
            f"task {task.name!r} has only test questions, so there are none for {split!r}; "
            f"evaluate it on test, without --curve and baselines that are fitted"
        )
    return load_questions(task, split, config.data_dir)


def _list_tasks(tasks: Task | str | Sequence[Task | str], config: EvaluateConfig) -> list[Task]:
    """Return the tasks, looked up by name; with `--reward`, a user's function grades answers."""
    if isinstance(tasks, Task):
        tasks = [tasks]
    elif isinstance(tasks, str):
        tasks = [name.strip() for name in tasks.split(",") if name.strip()]
    selected: list[Task] = []
    for task in tasks or [""]:  # get_tasks refuses an empty name
        if isinstance(task, Task):
            selected.append(task)
        else:
            selected += get_tasks(task, trust_code=config.trust_task_code)
    selected = [_apply_reward(task, config) for task in selected]
    for name, count in Counter(task.name for task in selected).items():
        if count > 1:
            raise TaskError(f"task {name!r} is named twice; name it once, or rename a file")
    return selected


def _apply_reward(task: Task, config: EvaluateConfig) -> Task:
    """Return the task, or with `--reward` the same task graded by the user's function."""
    if config.reward is None or isinstance(task, GradedTask):
        return task
    return GradedTask(task, config.reward, config.max_new_tokens)


def without_routers(config: EvaluateConfig) -> EvaluateConfig:
    """Return the settings for an evaluation of paths without routers, with baselines turned off.

    Baselines copy the executions of the routed model, so without routers there are none.

    Raises:
        ConfigError: There are no paths either, or a setting only has an effect on routers.
    """
    if config.paths is None:
        raise ConfigError(
            "neither routers nor paths are given; name the folder of routers (--routers), paths "
            "(--paths), or both"
        )
    default = EvaluateConfig()
    names = ["curve", "num_calibration", "baselines"]
    if config.latency:
        names += TIMING
    for name in names:
        value = getattr(config, name)
        if value in (getattr(default, name), "none"):
            continue
        flag = to_flag(name)
        if value is not True:
            flag += f" {value}"
        raise ConfigError(
            f"{flag} has no effect without routers; give routers as --routers, or leave out "
            f"{to_flag(name)}"
        )
    return replace(config, baselines="none")


def check_output(output: Path) -> None:
    """Raise RecordError if a report would read a file of the folder as a result by mistake."""
    for path in list_possible_results(output):
        if read_schema(path) != EVALUATION_SCHEMA:
            raise RecordError(
                f"{path} isn't a result of an evaluation, but reports would read it as a result; "
                f"move it, or choose another --output-dir"
            )


def needs_fitting(config: EvaluateConfig) -> bool:
    """Tell whether an evaluation fits depths or baselines on questions."""
    baselines = [BASELINES.get(name) for name in select_baselines(config.baselines)]
    if read_curve(config.curve):
        return True
    return any(baseline.fitted_on in QUESTIONS for baseline in baselines)


def choose_fitting_split(config: EvaluateConfig) -> str:
    """Return the split to fit depths and baselines on: `select`, or `fit` if that is reported."""
    if config.split == "select":
        return "fit"
    return "select"
