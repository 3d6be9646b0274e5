"""Which worked answers a choice may be held to, and what is said where it can't be."""

from __future__ import annotations

import json

import pytest

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError, TaskError
from drllm.evaluation.texts import worked_task
from drllm.tasks.base import get_tasks


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
