"""Which questions are asked, and which depths and baselines are fitted on."""

import pytest

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.evaluation.questions import (
    check_output,
    choose_fitting_split,
    needs_fitting,
    select_tasks,
)
from drllm.tasks.registry import get_tasks

TASKS = get_tasks("arc_easy,hellaswag")


def test_prompts_without_answers_are_not_evaluated(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Say something."}\n')
    with pytest.raises(TaskError, match="'prompts'"):
        select_tasks(EvaluateConfig(), str(file))


def test_depths_are_never_chosen_on_the_split_that_is_reported():
    assert choose_fitting_split(EvaluateConfig(split="test")) == "select"
    assert choose_fitting_split(EvaluateConfig(split="select")) == "fit"


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
        ({"num_calibration": 9}, r"--num-calibration 9 has no effect .* without --curve"),
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
