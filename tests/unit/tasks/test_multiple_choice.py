"""Multiple choice: how options are asked for, the re-tests, and rows whose options have labels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from drllm.errors import TaskError
from drllm.tasks.arc import ARC_EASY
from drllm.tasks.base import Example


def example(*choices: str, gold: int = 0, question: str = "Why?") -> Example:
    return Example(
        id="1", task="t", question=question, choices=choices, gold=gold, answer=choices[gold]
    )


def test_what_stands_before_a_question_stands_before_it_in_every_prompt() -> None:
    asked = example("ice", "fire", gold=1)
    in_context = replace(asked, context="On chemistry.")
    for reward in ARC_EASY.rewards:
        plain = [ARC_EASY.prompt(asked, reward), *ARC_EASY.retests(asked, reward)]
        others = [ARC_EASY.prompt(in_context, reward), *ARC_EASY.retests(in_context, reward)]
        assert others == [
            replace(prompt, text=f"On chemistry.\n\n{prompt.text}") for prompt in plain
        ]


def test_loglikelihood_is_retested_in_three_other_templates_and_by_character() -> None:
    asked = example("ice", "fire", gold=1)
    prompt = ARC_EASY.prompt(asked, "loglikelihood")
    retests = ARC_EASY.retests(asked, "loglikelihood")
    assert [retest.normalised for retest in retests] == [False, False, False, True]
    assert len({prompt.text, *(retest.text for retest in retests)}) == 4
    assert retests[3].text == prompt.text
    for retest in retests:
        assert "Why?" in retest.text
        assert (retest.continuations, retest.gold) == ((" ice", " fire"), 1)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_letters_are_retested_in_every_other_rotation(count: int) -> None:
    choices = [f"choice{index}" for index in range(count)]
    asked = example(*choices, gold=1)
    prompts = [ARC_EASY.prompt(asked, "letter"), *ARC_EASY.retests(asked, "letter")]
    assert prompts[0].answer == "B"
    assert sorted(prompt.answer for prompt in prompts) == list("ABCDE"[:count])
    for prompt in prompts:
        assert f"\n{prompt.answer}. choice1\n" in prompt.text
        assert all(prompt.text.count(f". {choice}\n") == 1 for choice in choices)
        assert (prompt.letters, prompt.chat) == ("ABCDE"[:count], True)
        assert prompt.text.endswith("Answer:")


def test_a_reward_that_does_not_fit_is_refused() -> None:
    for ask in (ARC_EASY.prompt, ARC_EASY.retests):
        with pytest.raises(TaskError, match="loglikelihood, letter"):
            ask(example("a", "b"), "boxed")
