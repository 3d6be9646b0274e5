"""Which questions are asked, and which depths and baselines are fitted on."""

import pytest

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.evaluation.questions import (
    check_output,
    choose_fitting_split,
    find_sources,
    needs_fitting,
    select_tasks,
)
from drllm.tasks.registry import get_task, get_tasks

TASKS = get_tasks("arc_easy,hellaswag")


def test_prompts_without_answers_are_not_evaluated(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Say something."}\n')
    with pytest.raises(TaskError, match="'prompts'"):
        select_tasks(EvaluateConfig(), str(file))


def test_a_task_is_fitted_on_its_own_questions_unless_another_is_named():
    config = EvaluateConfig(curve="0.1", fitted_on={"hellaswag": "arc_easy"})
    sources = find_sources(TASKS, config)
    assert sources == {"arc_easy": TASKS[0], "hellaswag": TASKS[0]}
    elsewhere = EvaluateConfig(curve="0.1", fitted_on={"hellaswag": "piqa"})
    assert find_sources(TASKS, elsewhere)["hellaswag"] is get_task("piqa")


def test_depths_are_never_chosen_on_the_split_that_is_reported():
    [arc, _] = TASKS
    assert choose_fitting_split(arc, EvaluateConfig(split="test")) == "select"
    assert choose_fitting_split(arc, EvaluateConfig(split="select")) == "fit"
    assert choose_fitting_split(arc, EvaluateConfig(splits={"arc_easy": "select"})) == "fit"


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
    assert needs_fitting(EvaluateConfig(**settings)) is fitted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fitted_on": {"hellaswag": "arc_easy"}}, "effect on the baselines quick without --curve"),
        ({"num_calibration": 9}, r"--num-calibration 9 has no effect .* without --curve"),
        ({"curve": "0.1", "fitted_on": {"hellaswag": "arc_eas"}}, "did you mean 'arc_easy'"),
    ],
)
@pytest.mark.usefixtures("few_harness_tasks")
def test_sources_that_make_no_sense_are_refused(values, message):
    with pytest.raises((ConfigError, TaskError), match=message):
        find_sources(TASKS, EvaluateConfig(**values))
    find_sources(TASKS, EvaluateConfig(num_calibration=9, baselines="block-influence"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"limits": {"arc_easy": 3}}, "limits: .*arc_easy"),
        ({"limit": 4, "limits": {"builtin_facts": 3}}, "--limit 4 has no effect"),
        (
            {"max_drop": 2.0, "max_loss_increase": 0.1, "num_texts": 29},
            "--num-texts 29 is too small",
        ),
        ({"max_drop": 2.0, "split": "select"}, "--max-drop 2 needs the questions of test"),
        ({"max_loss_increase": 0.1}, "without --max-drop"),
        ({"data_dir": "nowhere"}, "--data-dir nowhere is not a folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises((ConfigError, TaskError), match=message):
        select_tasks(EvaluateConfig(tasks="builtin_facts", **values))


def test_a_task_that_is_called_as_the_measured_times_are_is_refused(write_rows):
    row = {"question": "One or two?", "choices": ["one", "two"], "answer": 0}
    file = write_rows("latency", [{**row, "id": str(n)} for n in range(3)])
    with pytest.raises(ConfigError, match=r"latency\.json holds the measured times; rename"):
        select_tasks(EvaluateConfig(tasks=str(file)))


def test_a_task_whose_results_would_look_like_a_manifest_is_refused(write_rows):
    row = {"question": "One or two?", "choices": ["one", "two"], "answer": 0}
    file = write_rows("samples.manifest", [{**row, "id": str(n)} for n in range(3)])
    with pytest.raises(ConfigError, match=r"samples\.manifest\.json; rename its file"):
        select_tasks(EvaluateConfig(tasks=str(file)))


def test_a_file_that_would_be_taken_for_a_result_is_refused(tmp_path):
    check_output(tmp_path / "not yet there")
    (tmp_path / "arc.json").write_text('{"schema": "drllm.evaluation"}')
    (tmp_path / "latency.json").write_text("{}")
    check_output(tmp_path)
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(RecordError, match=r"notes\.json isn't a result"):
        check_output(tmp_path)
