"""How a search asks: options, letters, boxes, words of a passage; and how it asks again."""

from dataclasses import replace

import pytest

from drllm.errors import TaskError
from drllm.tasks.examples import Example
from drllm.tasks.prompt_formats import BOXED, GAP, LETTERS, OPTIONS
from drllm.tasks.registry import get_task
from drllm.tasks.rewards import grade


def example(*choices: str, gold=0):
    return Example(question="Why?", choices=choices, gold=gold, answer=choices[gold])


def test_what_stands_before_a_question_stands_before_it_in_every_prompt():
    question = example("ice", "fire", gold=1)
    in_context = replace(question, context="On chemistry.")
    for reward in OPTIONS.rewards:
        plain = OPTIONS.prompts(question, reward)
        assert OPTIONS.prompts(in_context, reward) == tuple(
            replace(prompt, text=f"On chemistry.\n\n{prompt.text}") for prompt in plain
        )


def test_loglikelihood_is_retested_in_three_other_templates_and_by_character():
    question = example("ice", "fire", gold=1)
    prompt, *retests = OPTIONS.prompts(question, "loglikelihood")
    assert [retest.normalised for retest in retests] == [False, False, False, True]
    assert len({prompt.text, *(retest.text for retest in retests)}) == 4
    assert retests[3].text == prompt.text
    for retest in retests:
        assert "Why?" in retest.text
        assert (retest.continuations, retest.gold) == ((" ice", " fire"), 1)


def test_each_option_fills_the_gap_and_what_follows_is_scored():
    question = Example(question="So  _ {left}. ", choices=("Ann", "Eve"), gold=1, answer="Eve")
    prompt, retest = GAP.prompts(question, "loglikelihood")
    assert (prompt.text, retest.text) == ("So", "Text: So")
    for each in (prompt, retest):
        assert each.unscored == ("  Ann", "  Eve")
        assert each.continuations == ("  Ann {left}.", "  Eve {left}.")
        assert each.gold == 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_letters_are_retested_in_every_other_rotation(count):
    choices = [f"choice{index}" for index in range(count)]
    question = example(*choices, gold=1)
    prompts = OPTIONS.prompts(question, "letter")
    assert prompts[0].answer == "B"
    assert sorted(prompt.answer for prompt in prompts) == list(LETTERS[:count])
    for prompt in prompts:
        assert f"\n{prompt.answer}. choice1\n" in prompt.text
        assert all(prompt.text.count(f". {choice}\n") == 1 for choice in choices)
        assert (prompt.letters, prompt.chat) == (LETTERS[:count], True)
        assert prompt.text.endswith("Answer:")


@pytest.mark.parametrize(
    ("name", "reward", "answer", "wrong"),
    [
        ("gsm8k", "boxed", r"\boxed{1,200}", "1200"),
        ("dart-2", "boxed", r"\boxed{1200.0}", r"\boxed{7}"),
        ("builtin_arithmetic", "boxed", r"\boxed{1200}", "1200"),
        ("squad_v2", "exact", "1200.", "twelve hundred"),
    ],
)
def test_generated_answers_are_asked_for_in_three_ways_and_graded(name, reward, answer, wrong):
    task = get_task(name)
    question = Example(question="How {many}?", answer="1200", context="A {passage}.")
    prompts = task.prompts(question, reward)
    assert len({prompt.text for prompt in prompts}) == 3
    for prompt in prompts:
        assert "How {many}?" in prompt.text
        assert ("A {passage}." in prompt.text) == (name == "squad_v2")
        assert (prompt.reward, prompt.chat) == (reward, True)
        assert prompt.max_new_tokens == (15 if reward == "boxed" else 16)
        assert grade(prompt, answer) == 1.0
        assert grade(prompt, wrong) == 0.0


def test_an_answer_has_the_tokens_that_its_longest_right_text_needs():
    unlimited = replace(BOXED, max_new_tokens=None)
    question = Example(question="?", answer="7", other_answers=("ж" * 100,))  # two bytes each
    assert unlimited.prompts(question, "boxed")[0].max_new_tokens == 208
    assert unlimited.prompts(replace(question, other_answers=()), "boxed")[0].max_new_tokens == 16


@pytest.mark.parametrize(
    ("name", "fitting"),
    [("arc_easy", "loglikelihood or letter"), ("hellaswag", "loglikelihood"), ("gsm8k", "boxed")],
)
def test_a_reward_that_does_not_fit_is_refused_with_those_that_do(name, fitting):
    task = get_task(name)
    with pytest.raises(TaskError, match=f"'{name}'; give {fitting}"):
        task.prompt(example("a", "b"), "exact")
