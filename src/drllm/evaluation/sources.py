"""Which questions depths are looked for and chosen on, and baselines are fitted on.

Owns that they are never those that a result is reported on, and that they may be another task's.
Leaves asking them to the stage. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from drllm.config import EvaluateConfig
from drllm.config.settings import flag_of
from drllm.errors import ConfigError
from drllm.evaluation.baselines.registry import BASELINES, QUESTIONS, depths, named
from drllm.tasks.base import Task, get_task


def is_fitted(config: EvaluateConfig) -> bool:
    """Tell whether an evaluation looks for depths or fits baselines on questions."""
    baselines = [BASELINES[name] for name in named(config.baselines)]
    return bool(depths(config.curve)) or any(each.fitted_on in QUESTIONS for each in baselines)


def sources_of(tasks: Sequence[Task], config: EvaluateConfig) -> dict[str, Task]:
    """Return, by the name of each task, the task whose questions all is fitted on.

    A task's own, unless `fitted_on` names another: where a set has only questions that are
    reported, or to see what holds elsewhere of what was chosen here.

    Raises:
        ConfigError: A `fitted_on` that can't be read; that or `num_calibration` without effect.
        TaskError: It names a task that there isn't.
    """
    others = config.own("fitted_on")
    for setting in ("fitted_on", "num_calibration"):
        value = getattr(config, setting)
        if value is not None and not is_fitted(config):
            raise ConfigError(
                f"{flag_of(setting)} {value} has no effect on the baselines {config.baselines} "
                f"without --curve; leave it out, or give --curve or baselines that are fitted"
            )
    by_name = {task.name: task for task in tasks}
    return {
        name: task if name not in others else by_name.get(others[name]) or get_task(others[name])
        for name, task in by_name.items()
    }


def chosen_on(source: Task, config: EvaluateConfig) -> str:
    """Return the split of a source: `select`, or `fit` where its `select` is what is reported."""
    return "fit" if config.split_of(source.name) == "select" else "select"
