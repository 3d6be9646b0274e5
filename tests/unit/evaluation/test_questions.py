"""Which questions are asked, and which depths and baselines are fitted on."""

from __future__ import annotations

import json

import pytest

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.evaluation.questions import (
    check_output,
    chosen_on,
    is_fitted,
    sources_of,
    tasks_of,
    worked_task,
)
from drllm.tasks.registry import get_task, get_tasks

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


# --- worked answers ----------------------------------------------------------------------------


def settings(**values):
    return EvaluateConfig(**{"curve": "0.1", "epsilon": 2.0, **values})


def worked(tasks="builtin_facts", **values):
    return worked_task(settings(tasks=tasks, **values), get_tasks(tasks))


@pytest.fixture
def make_data(tmp_path):
    """A function that writes invented rows as the training file of GSM8K."""

    def make(number):
        rows = [
            {"question": f"What are {place} and 1?", "answer": f"Add them.\n#### {place + 1}"}
            for place in range(number)
        ]
        (tmp_path / "gsm8k").mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "gsm8k" / "train.jsonl").write_text(text)
        return str(tmp_path)

    return make


def test_none_are_read_unless_a_task_is_named():
    assert worked() is None


def test_a_task_of_generated_answers_is_taken():
    assert worked(worked_answers="builtin_arithmetic").name == "builtin_arithmetic"


def test_options_are_no_worked_answers():
    with pytest.raises(ConfigError, match=r"arc_easy: its answers are options.*gsm8k"):
        worked(worked_answers="arc_easy")


def test_a_task_that_is_evaluated_alone_needs_no_second_look_at_its_own_answers():
    with pytest.raises(ConfigError, match="has no effect: builtin_arithmetic alone"):
        worked("builtin_arithmetic", worked_answers="builtin_arithmetic")
    both = "builtin_facts,builtin_arithmetic"
    assert worked(both, worked_answers="builtin_arithmetic") is not None


def test_a_split_without_a_file_is_answered_with_the_split_to_give(make_data):
    data_dir = make_data(600)
    with pytest.raises(TaskError, match=r"--worked-answers gsm8k: .*test\.jsonl") as caught:
        worked(worked_answers="gsm8k", data_dir=data_dir)
    assert str(caught.value).endswith(
        "; --splits gsm8k=select has depths chosen on fit and tested on select"
    )
    assert "\n" not in str(caught.value)
    assert worked(worked_answers="gsm8k", data_dir=data_dir, splits="gsm8k=select") is not None


def test_too_few_worked_answers_are_refused_before_anything_runs(make_data):
    data_dir = make_data(60)
    with pytest.raises(TaskError, match=r"split 'fit' has \d+ questions, and a bound needs 30"):
        worked(worked_answers="gsm8k", data_dir=data_dir, splits="gsm8k=select")


# --- what is refused before a model is loaded --------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": "arc_eas"}, "did you mean 'arc_easy'"),
        ({"limits": "arc_easy=3"}, "--limits: .*arc_easy"),
        ({"limit": 4, "limits": "builtin_facts=3"}, "--limit 4 has no effect"),
        ({"curve": "0.1", "epsilon": 2.0, "num_texts": 29}, "--num-texts 29 are too few"),
        ({"data_dir": "nowhere"}, "--data-dir nowhere is not a folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises((ConfigError, TaskError), match=message):
        tasks_of(EvaluateConfig(**values))


def test_a_task_that_is_called_as_the_measured_times_are_is_refused(tmp_path):
    file = tmp_path / "latency.jsonl"
    row = {"question": "One or two?", "choices": ["one", "two"], "answer": 0}
    file.write_text("".join(json.dumps({**row, "id": str(n)}) + "\n" for n in range(3)))
    with pytest.raises(ConfigError, match=r"latency\.json holds the measured times; rename"):
        tasks_of(EvaluateConfig(tasks=str(file)))


def test_a_file_that_would_be_taken_for_a_result_is_refused(tmp_path):
    check_output(tmp_path / "not yet there")
    (tmp_path / "arc.json").write_text('{"schema": "drllm.evaluation"}')
    (tmp_path / "latency.json").write_text("{}")
    check_output(tmp_path)
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(RecordError, match=r"notes\.json isn't a result"):
        check_output(tmp_path)
