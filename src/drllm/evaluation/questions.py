"""Selects the questions that an evaluation reports, and the questions that it fits on.

No question is reported if depths or baselines are fitted on it. All checks happen before a model is
loaded. This module doesn't import torch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drllm.config import TIMING, EvaluateConfig
from drllm.config.fields import require_tasks, to_flag
from drllm.errors import ConfigError, RecordError, TaskError, unknown_name
from drllm.evaluation.baselines.base import (
    BASELINES,
    QUESTIONS,
    check,
    read_curve,
    select_baselines,
)
from drllm.extras import need
from drllm.records.results import EVALUATION_SCHEMA, LATENCY_FILE, list_results, read_schema
from drllm.statistics.verdicts import FEWEST_TEXTS
from drllm.tasks.base import Task, load_questions
from drllm.tasks.examples import Example
from drllm.tasks.graded import GradedTask
from drllm.tasks.registry import get_task, get_tasks
from drllm.tasks.rewards import check_installed


def select_tasks(
    config: EvaluateConfig, tasks: Task | str | Sequence[Task | str] | None = None
) -> list[Task]:
    """Check and return the tasks to evaluate; None takes the config's tasks.

    Raises:
        ConfigError: Settings make no sense together, or a package is missing.
        TaskError: A task is unknown, or has no questions.
    """
    need("eval", "an evaluation")
    selected = _list_tasks(require_tasks(config.tasks) if tasks is None else tasks, config)
    check(config)
    _check_max_drop(config, selected)
    _check_names(config, [task.name for task in selected])
    for task in selected:
        _check_questions(task, config)
    sources = find_sources(selected, config)
    _check_limit(config, [task.name for task in selected])
    if needs_fitting(config):
        for source in sources.values():
            _read_questions(source, fitting_split(source, config), config)
    return selected


def _check_names(config: EvaluateConfig, names: Sequence[str]) -> None:
    """Refuse a task named like the file of times, and settings for tasks that aren't evaluated."""
    if Path(LATENCY_FILE).stem in names:
        raise ConfigError(
            f"a task is called {Path(LATENCY_FILE).stem!r}, but {LATENCY_FILE} holds the measured "
            f"times; rename its file"
        )
    for setting in ("limits", "splits", "fitted_on"):
        for name in getattr(config, setting) or {}:
            if name not in names:
                raise ConfigError(f"{setting}: " + unknown_name("task", name, names))


def _check_questions(task: Task, config: EvaluateConfig) -> None:
    """Refuse a task that has no answers or no questions, or whose reward lacks a package."""
    task.check_answers()
    has_own_format = task.harness is None and task.prompt_format is not None
    if has_own_format:  # prompted and graded as in a search
        check_installed(task.check_reward(None))
    _read_questions(task, config.get_split(task.name), config)


def _check_limit(config: EvaluateConfig, names: Sequence[str]) -> None:
    """Refuse a `--limit` that has no effect."""
    if config.limit is not None and set(names) <= (config.limits or {}).keys():
        raise ConfigError(
            f"--limit {config.limit} has no effect, since 'limits' names every task; leave it out"
        )


def _check_max_drop(config: EvaluateConfig, tasks: Sequence[Task]) -> None:
    """Refuse `--max-drop` on questions of another split than `test`, and on too few texts."""
    if config.max_drop is None:
        return
    for task in tasks:
        split = config.get_split(task.name)
        if split != "test":
            raise ConfigError(
                f"--max-drop {config.max_drop:g} asks what the test questions exclude, but "
                f"{task.name} is evaluated on {split}; leave it out, or evaluate on test"
            )
    if config.max_loss_increase is not None and config.num_texts < FEWEST_TEXTS:
        raise ConfigError(
            f"--num-texts {config.num_texts} is too small for --max-loss-increase "
            f"{config.max_loss_increase:g}; give at least {FEWEST_TEXTS}"
        )


def _read_questions(task: Task, split: str, config: EvaluateConfig) -> list[Example]:
    """Return the questions of a split.

    Raises:
        TaskError: The split has no questions, or the task has only the questions of `test`.
    """
    if split != "test" and task.reports_test_alone:
        raise TaskError(
            f"task {task.name!r} is the harness' own: an evaluation has only the questions that "
            f"it reports, and none for {split!r}; name another task as fitted_on, or leave out "
            f"what needs them"
        )
    return load_questions(task, split, config.data_dir)


def _list_tasks(tasks: Task | str | Sequence[Task | str], config: EvaluateConfig) -> list[Task]:
    """Return the named tasks; with `--reward`, the user's function grades their answers."""
    if isinstance(tasks, Task):
        tasks = [tasks]
    elif isinstance(tasks, str):
        tasks = [name.strip() for name in tasks.split(",") if name.strip()]
    selected: list[Task] = []
    for task in tasks or [""]:
        if isinstance(task, Task):
            selected.append(task)
        else:
            selected += get_tasks(task)
    selected = [_graded(task, config) for task in selected]
    for name, count in Counter(task.name for task in selected).items():
        if count > 1:
            raise TaskError(f"task {name!r} is named twice; name it once, or rename a file")
    return selected


def _graded(task: Task, config: EvaluateConfig) -> Task:
    """Return a task; with `--reward`, the user's function grades its answers."""
    if config.reward is None or isinstance(task, GradedTask):
        return task
    return GradedTask(task, config.reward, config.max_new_tokens)


def without_routers(config: EvaluateConfig) -> EvaluateConfig:
    """Return the settings of an evaluation without routers, and so without baselines.

    Raises:
        ConfigError: There are no paths either, or a setting only has an effect on routers.
    """
    if config.paths is None:
        raise ConfigError(
            "neither routers nor paths are given; name the folder of routers (--routers), paths "
            "(--paths), or both"
        )
    default = EvaluateConfig()
    for name in ("curve", "num_calibration", "baselines", *TIMING):
        value = getattr(config, name)
        if value not in (getattr(default, name), "none"):
            flag = to_flag(name) if value is True else f"{to_flag(name)} {value}"
            raise ConfigError(
                f"{flag} has no effect without routers; give them as --routers, or leave it out"
            )
    return replace(config, baselines="none")


def check_output(output: Path) -> None:
    """Raise RecordError if a folder has other files that reports would read as results."""
    for path in list_results(output):
        if read_schema(path) != EVALUATION_SCHEMA:
            raise RecordError(
                f"{path} isn't a result of an evaluation, and would be taken for one; move it, or "
                f"choose another --output-dir"
            )


def needs_fitting(config: EvaluateConfig) -> bool:
    """Tell whether an evaluation finds depths or fits baselines on questions."""
    baselines = [BASELINES.get(name) for name in select_baselines(config.baselines)]
    return bool(read_curve(config.curve)) or any(each.fitted_on in QUESTIONS for each in baselines)


def find_sources(tasks: Sequence[Task], config: EvaluateConfig) -> dict[str, Task]:
    """Return each task's source by the task's name: the task whose questions are used for fitting.

    The source is the task itself, unless `fitted_on` names another task. Another source is needed
    if all questions of a task are reported. It also shows whether depths and baselines that are
    chosen on one task hold on another.

    Raises:
        ConfigError: `fitted_on` or `num_calibration` has no effect.
        TaskError: A task is unknown.
    """
    values = {"fitted_on": config.fitted_on, "--num-calibration": config.num_calibration}
    for setting, value in values.items():
        if value is not None and not needs_fitting(config):
            raise ConfigError(
                f"{setting} {value} has no effect on the baselines {config.baselines} "
                f"without --curve; leave it out, or give --curve or baselines that are fitted"
            )
    by_name = {task.name: task for task in tasks}
    sources = dict(by_name)
    for name, other in (config.fitted_on or {}).items():
        source = by_name.get(other) or get_task(other)
        sources[name] = _graded(source, config)
    return sources


def fitting_split(source: Task, config: EvaluateConfig) -> str:
    """Return the split of a source to fit on: `select`, or `fit` if its `select` is reported."""
    return "fit" if config.get_split(source.name) == "select" else "select"
