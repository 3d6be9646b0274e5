"""The full model is asked some questions before a shrink, and must answer one of them right."""

import json

import pytest

from drllm.config import ShrinkConfig
from drllm.errors import NotShownError
from drllm.pipeline.shrink import TUNED_FOLDER, ShrinkRun
from drllm.pipeline.shrink_answers import describe_wrong_answers
from drllm.pipeline.shrink_questions import read_questions
from drllm.records.static_paths import TEST
from notes import Notes


@pytest.fixture
def base(tiny_base):
    return tiny_base()


def read_rows(folder, rows):
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(ShrinkConfig(), str(file))


def make_sums(answer):
    """Return questions whose right answer is the same text."""
    rows = []
    for number in range(160):
        question = f"What is {number} + 0?"
        rows.append({"question": question, "answer": answer, "grader": "exact"})
    return rows


def make_run(base, questions, folder, **settings):
    return ShrinkRun(base, questions, ShrinkConfig(**settings), folder, Notes())


def test_a_shrink_ends_where_the_full_model_answers_no_question_right(base, tmp_path):
    questions = read_rows(tmp_path, make_sums("forty-two"))
    with pytest.raises(NotShownError) as error:
        make_run(base, questions, tmp_path).check_answers(force=False)
    message = str(error.value)
    assert message.startswith("the full model answers none of 30 questions of sums right: to 'What")
    assert message.count("and 'forty-two' is right") == 3
    assert message.endswith("or give --force to go on")


def test_a_shrink_by_force_or_of_a_given_size_goes_on_with_a_note(base, tmp_path):
    questions = read_rows(tmp_path, make_sums("forty-two"))
    for force, settings in ((True, {}), (False, {"layers": 3})):
        run = make_run(base, questions, tmp_path, **settings)
        run.check_answers(force=force)
        [note] = run.listener.texts
        assert note.startswith("the full model answers none of 30 questions")


def test_a_shrink_that_is_resumed_asks_nothing_again(base, tmp_path):
    questions = read_rows(tmp_path, make_sums("forty-two"))
    (tmp_path / TUNED_FOLDER).mkdir()
    run = make_run(base, questions, tmp_path)
    run.check_answers(force=False)
    assert run.listener.texts == []


def test_no_question_that_is_held_out_is_asked(base, tmp_path, monkeypatch):
    asked = []
    questions = read_rows(tmp_path, make_sums("forty-two"))
    [splits] = questions.tasks

    def prompt(example, reward):
        asked.append(example)
        return type(splits.task).prompt(splits.task, example, reward)

    monkeypatch.setattr(splits.task, "prompt", prompt)
    describe_wrong_answers(base, splits, seed=0)
    assert len(asked) == 30
    assert not set(asked) & set(splits.examples[TEST])


@pytest.mark.parametrize("gold_is_best", [True, False])
def test_options_are_graded_by_the_likeliest(base, tmp_path, monkeypatch, gold_is_best):
    rows = []
    for number in range(160):
        choices = [f"{number}", f"{number + 1}"]
        rows.append({"question": f"What is {number} + 0?", "choices": choices, "answer": 0})
    [splits] = read_rows(tmp_path, rows).tasks

    class Likely:
        logprobs = (-1.0, -2.0) if gold_is_best else (-2.0, -1.0)

    monkeypatch.setattr(
        "drllm.pipeline.shrink_answers.score", lambda _, requests, __: [[Likely()] * len(requests)]
    )
    sentence = describe_wrong_answers(base, splits, seed=0)
    assert ("answers none of 30 questions of sums right" in sentence) is not gold_is_best
