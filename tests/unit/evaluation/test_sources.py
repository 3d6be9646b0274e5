"""Which questions depths and baselines are fitted on."""

from __future__ import annotations

import pytest

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError, TaskError
from drllm.evaluation.sources import chosen_on, is_fitted, sources_of
from drllm.tasks.base import get_task, get_tasks

TASKS = get_tasks("arc_easy,hellaswag")


def test_a_task_is_fitted_on_its_own_questions_unless_another_is_named():
    config = EvaluateConfig(curve="0.1", fitted_on="hellaswag=arc_easy")
    sources = sources_of(TASKS, config)
    assert sources == {"arc_easy": TASKS[0], "hellaswag": TASKS[0]}
    elsewhere = EvaluateConfig(curve="0.1", fitted_on="hellaswag=piqa")
    assert sources_of(TASKS, elsewhere)["hellaswag"] is get_task("piqa")


def test_depths_are_never_chosen_on_the_split_that_is_reported():
    [arc, _] = TASKS
    assert chosen_on(arc, EvaluateConfig(split="test")) == "select"
    assert chosen_on(arc, EvaluateConfig(split="select")) == "fit"
    assert chosen_on(arc, EvaluateConfig(splits="arc_easy=select")) == "fit"


@pytest.mark.parametrize(
    ("settings", "fitted"),
    [
        ({}, False),
        ({"baselines": "none"}, False),
        ({"baselines": "none", "curve": "0.1"}, True),
        ({"baselines": "block-influence"}, True),
        ({"baselines": "best-program"}, True),
        ({"baselines": "sequence-router"}, False),
    ],
)
def test_something_is_fitted_with_a_curve_or_baselines_that_need_it(settings, fitted):
    assert is_fitted(EvaluateConfig(**settings)) is fitted


def test_another_source_without_effect_is_refused():
    with pytest.raises(ConfigError, match="has no effect on the baselines quick without --curve"):
        sources_of(TASKS, EvaluateConfig(fitted_on="hellaswag=arc_easy"))


def test_a_number_of_questions_without_effect_is_refused():
    with pytest.raises(ConfigError, match=r"--num-calibration 9 has no effect .* without --curve"):
        sources_of(TASKS, EvaluateConfig(num_calibration=9))
    sources_of(TASKS, EvaluateConfig(num_calibration=9, baselines="block-repeat"))


def test_an_unknown_source_is_refused_with_near_names():
    with pytest.raises(TaskError, match="did you mean 'arc_easy'"):
        sources_of(TASKS, EvaluateConfig(curve="0.1", fitted_on="hellaswag=arc_eas"))
    with pytest.raises(ConfigError, match="--fitted-on: 'hellaswag' doesn't fit"):
        sources_of(TASKS, EvaluateConfig(curve="0.1", fitted_on="hellaswag"))
