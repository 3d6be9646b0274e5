"""Tasks of lm-evaluation-harness as a source of questions to search, tune and train on."""

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.tasks.harness import StockTask
from drllm.tasks.registry import get_task
from harness_files import GENERATED, OPTIONS, ROWS, written_task

MORE = [
    {"q": f"Is {one} larger than {other}?", "yes": int(one > other)}
    for one in range(10, 30)
    for other in range(10, 20)
]


def questions(task, split):
    return {example.question for example in task.examples(split)}


def test_a_set_without_questions_to_train_on_is_divided_by_their_texts(tmp_path):
    task = StockTask(written_task(tmp_path, OPTIONS, {"test": MORE}))
    parts = [questions(task, split) for split in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(MORE)
    assert all(parts)
    assert not task.reports_test_alone


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_questions_that_are_not_reported_are_those_to_fit_on(tmp_path, split):
    task = StockTask(written_task(tmp_path, OPTIONS, {split: [*MORE, MORE[0]], "test": ROWS}))
    assert len(task.examples("test")) == len(ROWS)
    parts = [questions(task, split) for split in SPLITS if split != "test"]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(MORE)
    assert task.reports_test_alone


def test_a_question_is_asked_as_the_harness_has_it_behind_others_than_itself(tmp_path):
    task = StockTask(written_task(tmp_path, OPTIONS, {"train": MORE[:8], "test": ROWS}))
    for split in SPLITS:
        for example in task.examples(split):
            asked, by_character = task.prompts(example, "loglikelihood")
            *shots, last = asked.text.split("\n\n")
            assert last == example.question
            assert len(shots) == 2
            assert not any(shot.startswith(last) for shot in shots)
            assert asked.continuations == (" no", " yes")
            assert by_character.normalised
            assert asked == task.prompts(example, "loglikelihood")[0]
    right = [each for each in task.examples("test") if each.question.startswith("Is 2 larger th")]
    assert [each.answer for each in right] == ["yes", "yes", "no"]


def test_a_generated_answer_is_graded_against_the_target(tmp_path):
    task = get_task(written_task(tmp_path, GENERATED))
    [prompt] = task.prompts(task.examples("test")[0], "exact")
    assert (prompt.max_new_tokens, prompt.answer) in {(4, "0"), (4, "1")}
    assert not prompt.chat


def test_a_question_that_is_asked_once_an_option_is_evaluated_alone(tmp_path):
    changes = {"doc_to_text": "{{yes}}", "doc_to_target": "{{q}}", "doc_to_choice": ["so", "no"]}
    task = StockTask(written_task(tmp_path, OPTIONS, **changes, num_fewshot=0))
    with pytest.raises(TaskError, match="in as many ways as it has options"):
        task.prompts(task.examples("test")[0], "loglikelihood")
