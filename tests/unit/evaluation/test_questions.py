"""Which questions are asked, and which depths and baselines are fitted on."""

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


def test_prompts_without_answers_are_not_evaluated(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Say something."}\n')
    with pytest.raises(TaskError, match="without answers"):
        tasks_of(EvaluateConfig(), str(file))


def test_a_task_is_fitted_on_its_own_questions_unless_another_is_named():
    config = EvaluateConfig(curve="0.1", fitted_on={"hellaswag": "arc_easy"})
    sources = sources_of(TASKS, config)
    assert sources == {"arc_easy": TASKS[0], "hellaswag": TASKS[0]}
    elsewhere = EvaluateConfig(curve="0.1", fitted_on={"hellaswag": "piqa"})
    assert sources_of(TASKS, elsewhere)["hellaswag"] is get_task("piqa")


def test_depths_are_never_chosen_on_the_split_that_is_reported():
    [arc, _] = TASKS
    assert chosen_on(arc, EvaluateConfig(split="test")) == "select"
    assert chosen_on(arc, EvaluateConfig(split="select")) == "fit"
    assert chosen_on(arc, EvaluateConfig(splits={"arc_easy": "select"})) == "fit"


@pytest.mark.parametrize(
    ("settings", "fitted"),
    [
        ({}, False),
        ({"baselines": "none"}, False),
        ({"baselines": "none", "curve": "0.1"}, True),
        ({"baselines": "block-influence"}, True),
        ({"baselines": "greedy-by-loss"}, True),
        ({"baselines": "sequence-router"}, False),
    ],
)
def test_something_is_fitted_with_a_curve_or_baselines_that_need_it(settings, fitted):
    assert is_fitted(EvaluateConfig(**settings)) is fitted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fitted_on": {"hellaswag": "arc_easy"}}, "effect on the baselines quick without --curve"),
        ({"num_calibration": 9}, r"--num-calibration 9 has no effect .* without --curve"),
        ({"curve": "0.1", "fitted_on": {"hellaswag": "arc_eas"}}, "did you mean 'arc_easy'"),
    ],
)
def test_sources_that_make_no_sense_are_refused(values, message):
    with pytest.raises((ConfigError, TaskError), match=message):
        sources_of(TASKS, EvaluateConfig(**values))
    sources_of(TASKS, EvaluateConfig(num_calibration=9, baselines="block-influence"))


def worked(tasks="builtin_facts", **values):
    config = EvaluateConfig(curve="0.1", epsilon=2.0, tasks=tasks, **values)
    return worked_task(config, get_tasks(tasks))


@pytest.fixture
def make_data(tmp_path, write_rows):
    """A function that writes invented rows as the training file of GSM8K."""

    def make(number):
        rows = [
            {"question": f"What are {place} and 1?", "answer": f"Add them.\n#### {place + 1}"}
            for place in range(number)
        ]
        write_rows("gsm8k/train", rows)
        return str(tmp_path)

    return make


def test_worked_answers_are_those_of_a_named_task_whose_answers_are_generated():
    assert worked() is None
    name = "builtin_arithmetic"
    assert worked(worked_answers=name).name == name
    assert worked(f"builtin_facts,{name}", worked_answers=name).name == name
    with pytest.raises(ConfigError, match=r"arc_easy: its answers are options.*gsm8k"):
        worked(worked_answers="arc_easy")
    with pytest.raises(ConfigError, match=f"has no effect: {name} alone"):
        worked(name, worked_answers=name)


def test_a_split_without_a_file_is_answered_with_the_split_to_give(make_data):
    data_dir = make_data(600)
    with pytest.raises(TaskError, match=r"--worked-answers gsm8k: .*test\.jsonl") as caught:
        worked(worked_answers="gsm8k", data_dir=data_dir)
    assert str(caught.value).endswith(
        "; 'splits: {gsm8k: select}' in a YAML file (--config) has depths chosen on fit and tested "
        "on select"
    )
    assert "\n" not in str(caught.value)
    assert worked(worked_answers="gsm8k", data_dir=data_dir, splits={"gsm8k": "select"}) is not None


def test_too_few_worked_answers_are_refused_before_anything_runs(make_data):
    with pytest.raises(TaskError, match=r"split 'fit' has \d+ questions, and a bound needs 30"):
        worked(worked_answers="gsm8k", data_dir=make_data(60), splits={"gsm8k": "select"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"limits": {"arc_easy": 3}}, "limits: .*arc_easy"),
        ({"limit": 4, "limits": {"builtin_facts": 3}}, "--limit 4 has no effect"),
        ({"curve": "0.1", "epsilon": 2.0, "num_texts": 29}, "--num-texts 29 are too few"),
        ({"data_dir": "nowhere"}, "--data-dir nowhere is not a folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises((ConfigError, TaskError), match=message):
        tasks_of(EvaluateConfig(**values))


def test_a_task_that_is_called_as_the_measured_times_are_is_refused(write_rows):
    row = {"question": "One or two?", "choices": ["one", "two"], "answer": 0}
    file = write_rows("latency", [{**row, "id": str(n)} for n in range(3)])
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
