"""Tasks of lm-evaluation-harness as a source of questions to search, train and learn on."""

from pathlib import Path

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.tasks.harness import LmEvalTask
from drllm.tasks.registry import get_task
from drllm.tasks.rewards import grade
from harness_files import GENERATED, OPTIONS, ROWS, written_task

MORE = [
    {"q": f"Is {one} larger than {other}?", "yes": int(one > other)}
    for one in range(10, 30)
    for other in range(10, 20)
]


def questions(task, split):
    return {example.question for example in task.examples(split)}


def test_a_set_without_questions_to_train_on_is_divided_by_their_texts(tmp_path):
    task = LmEvalTask(written_task(tmp_path, OPTIONS, {"test": MORE}))
    parts = [questions(task, split) for split in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(MORE)
    assert all(parts)
    assert not task.has_only_test


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_questions_that_are_not_reported_are_those_to_fit_on(tmp_path, split):
    task = LmEvalTask(written_task(tmp_path, OPTIONS, {split: [*MORE, MORE[0]], "test": ROWS}))
    assert len(task.examples("test")) == len(ROWS)
    parts = [questions(task, split) for split in SPLITS if split != "test"]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(MORE)
    assert task.has_only_test


def test_a_trusted_task_file_runs_code_from_its_folder(tmp_path):
    file = written_task(tmp_path, GENERATED)
    (tmp_path / "utils.py").write_text("def text(doc):\n    return doc['q']\n")
    path = Path(file)
    path.write_text(path.read_text().replace("'{{q}}'", "!function utils.text"))
    task = get_task(file, trust_code=True)
    assert task.examples("test")[0].question.startswith("Is ")


def test_a_question_is_asked_as_the_harness_has_it_behind_others_than_itself(tmp_path):
    task = LmEvalTask(written_task(tmp_path, OPTIONS, {"train": MORE[:8], "test": ROWS}))
    for split in SPLITS:
        for example in task.examples(split):
            prompt, by_character = task.prompts(example, "loglikelihood")
            *shots, last = prompt.text.split("\n\n")
            assert last == example.question
            assert len(shots) == 2
            assert not any(shot.startswith(last) for shot in shots)
            assert prompt.continuations == (" no", " yes")
            assert by_character.normalised
            assert prompt == task.prompts(example, "loglikelihood")[0]
    right = [each for each in task.examples("test") if each.question.startswith("Is 2 larger th")]
    assert [each.answer for each in right] == ["yes", "yes", "no"]


def test_a_question_that_is_reported_too_is_not_fitted_on(tmp_path):
    task = LmEvalTask(written_task(tmp_path, OPTIONS, {"train": MORE, "test": MORE[:30]}))
    fitted = set.union(*(questions(task, split) for split in SPLITS if split != "test"))
    assert fitted.isdisjoint(questions(task, "test"))
    assert len(fitted) == len(MORE) - 30


def test_the_beginning_of_an_answer_stands_before_it_as_in_an_evaluation(tmp_path):
    task = LmEvalTask(written_task(tmp_path, OPTIONS, gen_prefix="I say", num_fewshot=0))
    [prompt, _] = task.prompts(task.examples("test")[0], "loglikelihood")
    assert prompt.text.endswith("Answer: I say")


def test_a_question_that_is_always_among_the_worked_examples_has_none(tmp_path):
    first = {"num_fewshot": 2, "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    task = LmEvalTask(written_task(tmp_path, OPTIONS, {"train": MORE[:4], "test": ROWS}, **first))
    prompt = [
        task.prompts(example, "loglikelihood")[0].text.count("Answer:")
        for split in SPLITS[:3]
        for example in task.examples(split)
    ]
    assert sorted(prompt) == [1, 1, 3, 3]


def test_questions_with_no_right_answer_or_several_right_options_are_not_fitted_on(tmp_path):
    rows = [{**row, "yes": "[0, 1]" if n < 50 else str(row["yes"])} for n, row in enumerate(MORE)]
    test = [{**row, "yes": str(row["yes"])} for row in ROWS]
    task = LmEvalTask(written_task(tmp_path, OPTIONS, {"train": rows, "test": test}))
    fitted = set.union(*(questions(task, split) for split in SPLITS if split != "test"))
    assert len(fitted) == len(MORE) - 50


def test_every_answer_of_a_list_is_right(tmp_path):
    rows = [{"q": "Which city?", "yes": ["Paris", "City of Paris"]}]
    answers = {"doc_to_target": "{{yes}}"}
    task = LmEvalTask(written_task(tmp_path, GENERATED, {"test": rows}, **answers))
    [(_, _, example)] = task.reported
    [prompt] = task.prompts(example, "exact")
    assert [grade(prompt, text) for text in ("paris.", "City of Paris", "Rome")] == [1, 1, 0]


def test_a_generated_answer_is_graded_against_the_target(tmp_path):
    task = get_task(written_task(tmp_path, GENERATED), trust_code=True)
    [prompt] = task.prompts(task.examples("test")[0], "exact")
    assert (prompt.max_new_tokens, prompt.answer) in {(4, "0"), (4, "1")}
    assert not prompt.chat


def test_a_question_that_is_asked_once_an_option_is_evaluated_alone(tmp_path):
    changes = {"doc_to_text": "{{yes}}", "doc_to_target": "{{q}}", "doc_to_choice": ["so", "no"]}
    task = LmEvalTask(written_task(tmp_path, OPTIONS, **changes, num_fewshot=0))
    with pytest.raises(TaskError, match="has a prompt for each option"):
        task.prompts(task.examples("test")[0], "loglikelihood")
