"""Worked examples stand before every way of asking a question, and long answers are asked for."""

import pytest

from drllm.config import SearchConfig
from drllm.errors import ConfigError, TaskError
from drllm.search.questions import collect_questions
from drllm.tasks.examples import Example
from drllm.tasks.registry import get_task
from drllm.tasks.worked import WorkedTask


def asked(**settings):
    return collect_questions(None, SearchConfig(limit=3, **settings))


def test_worked_examples_stand_with_their_right_options_before_a_question():
    alone = asked(dataset="builtin_facts")
    for one, shown in zip(alone, asked(dataset="builtin_facts", num_fewshot=2), strict=True):
        before = shown.prompt.text.removesuffix(one.prompt.text)
        *examples, rest = before.split("\n\n")
        assert rest == ""
        assert [each.count("Question: ") for each in examples] == [1, 1]
        assert all("\nAnswer: " in each for each in examples)
        assert shown.prompt.continuations == one.prompt.continuations


def test_every_way_of_asking_has_examples_that_are_asked_alike():
    task = get_task("builtin_facts")
    question, shot = task.examples("search")[0], task.examples("fit")[0]
    alone, of_shot = (task.prompts(each, "loglikelihood") for each in (question, shot))
    shown = WorkedTask(task, [shot]).prompts(question, "loglikelihood")
    assert [each.text for each in shown] == [
        f"{before.text}{before.continuations[before.gold]}\n\n{own.text}"
        for before, own in zip(of_shot, alone, strict=True)
    ]


def test_all_questions_have_the_same_examples_and_none_of_them_is_searched():
    alone = asked(dataset="builtin_facts")
    shown = asked(dataset="builtin_facts", num_fewshot=2)
    before = {
        after.prompt.text.removesuffix(one.prompt.text)
        for one, after in zip(alone, shown, strict=True)
    }
    (text,) = before
    searched = {example.question for example in get_task("builtin_facts").examples("search")}
    assert not any(f"Question: {question}\n" in text for question in searched)


def test_a_box_with_room_is_asked_to_be_worked_out_step_by_step():
    short, long = (
        asked(dataset="builtin_arithmetic", reward="boxed", max_new_tokens=length)[0].prompt
        for length in (None, 512)
    )
    assert long.max_new_tokens == 512 > short.max_new_tokens
    assert "step by step" in long.text
    assert "step by step" not in short.text
    assert long.answer == short.answer


def test_a_solution_is_shown_where_an_answer_may_be_worked_out():
    shot = Example(question="1 + 1?", answer="2", solution="One and one are two.")
    question = Example(question="2 + 3?", answer="5")
    task = get_task("builtin_arithmetic")
    long, short = (
        WorkedTask(task, [shot], length).prompt(question, "boxed").text for length in (64, None)
    )
    assert "One and one are two.\n\\boxed{2}\n\n" in long
    assert "One and one" not in short
    assert "\\boxed{2}\n\n" in short


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_new_tokens": 9}, ConfigError, "--max-new-tokens 9 has no effect"),
        ({"num_fewshot": 10_000}, TaskError, "give at most"),
    ],
)
def test_what_has_no_effect_or_is_too_much_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        asked(dataset="builtin_facts", **settings)


def test_rows_given_from_python_are_never_shown_before_themselves():
    rows = [
        {"question": f"{n:03} + 1?", "answer": f"{n + 1}", "grader": "exact"} for n in range(40)
    ]
    questions = collect_questions(rows, SearchConfig(num_fewshot=2))
    for one in questions:
        assert one.prompt.text.count(one.example.question) == 1
    assert len(questions) == 38


def test_prompts_without_answers_have_nothing_to_show():
    rows = [{"prompt": f"Tell me about {n}."} for n in range(40)]
    with pytest.raises(ConfigError, match="--num-fewshot has no effect"):
        collect_questions(rows, SearchConfig(num_fewshot=2))
    with pytest.raises(ConfigError, match="--max-new-tokens 9 has no effect"):
        collect_questions(rows, SearchConfig(max_new_tokens=9))
