"""Multiple-choice questions: the two ways of asking them, and rows whose options have labels.

Owns the prompt of `loglikelihood` (byte for byte what lm-evaluation-harness renders for ARC and
PIQA, and in its cloze form for MMLU) and of `letter`, the other templates of the re-test, and the
schema that ARC and CommonsenseQA share. Leaves grading to `grading` and where questions come from
to the tasks. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drllm.errors import TaskError
from drllm.tasks.base import Example, Prompt, Task
from drllm.tasks.rows import text_of, texts_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEMPLATE = "Question: {question}\nAnswer:"
OTHER_TEMPLATES = (
    "Q: {question}\nA:",
    "{question}\nThe correct answer is:",
    "Answer the following question.\n\n{question}\n\nAnswer:",
)
LETTER_TEMPLATE = (
    "Answer the following multiple-choice question with the letter of the right option only.\n\n"
    "Question: {question}\n{options}\nAnswer:"
)
LETTER_TOKENS = 10
"""Most tokens of a letter answer (Dr.LLM section 4)."""


class MultipleChoiceTask(Task):
    """A task whose questions have options; a subclass says where the questions come from.

    Attributes:
        template: What stands around the question where the options' texts are scored.
        other_templates: Three others, for the re-test.
    """

    rewards: tuple[str, ...] = ("loglikelihood", "letter")
    template: str = TEMPLATE
    other_templates: tuple[str, ...] = OTHER_TEMPLATES

    def prompt(self, example: Example, reward: str) -> Prompt:
        """Return how the question is asked.

        Args:
            example: A question with options.
            reward: `loglikelihood` shows the question and scores the options' texts; `letter`
                shows lettered options and asks for a letter.

        Raises:
            TaskError: Another reward.
        """
        if self.check_reward(reward) == "letter":
            return letter_prompt(example, rotation=0)
        return choices_prompt(example, self.template)

    def retests(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the other ways of asking the same question.

        For `loglikelihood` three other templates and the first one scored by character; for
        `letter` every other rotation of the options, so that the right letter moves.

        Raises:
            TaskError: Another reward.

        Source: ours (docs/differences.md, D-05).
        """
        if self.check_reward(reward) == "letter":
            return tuple(
                letter_prompt(example, rotation) for rotation in range(1, len(example.choices))
            )
        return (
            *(choices_prompt(example, template) for template in self.other_templates),
            choices_prompt(example, self.template, normalised=True),
        )


def choices_prompt(example: Example, template: str, *, normalised: bool = False) -> Prompt:
    """Return a prompt whose continuations are the options' texts, each after a space."""
    return Prompt(
        text=_in_context(example, template.format(question=example.question)),
        reward="loglikelihood",
        answer=example.answer,
        continuations=tuple(f" {choice}" for choice in example.choices),
        gold=example.gold,
        normalised=normalised,
    )


def letter_prompt(example: Example, rotation: int) -> Prompt:
    """Return a prompt that lists the options, lettered, and asks for a letter.

    Args:
        example: A question with options.
        rotation: How many options move from the front to the end.
    """
    assert example.gold is not None
    count = len(example.choices)
    order = [(index + rotation) % count for index in range(count)]
    letters = LETTERS[:count]
    options = "\n".join(
        f"{letter}. {example.choices[index]}" for letter, index in zip(letters, order, strict=True)
    )
    text = LETTER_TEMPLATE.format(question=example.question, options=options)
    return Prompt(
        text=_in_context(example, text),
        reward="letter",
        answer=letters[order.index(example.gold)],
        chat=True,
        max_new_tokens=LETTER_TOKENS,
        letters=letters,
    )


def _in_context(example: Example, text: str) -> str:
    return f"{example.context}\n\n{text}" if example.context else text


def labelled_example(row: Mapping[str, Any], task: str) -> Example:
    """Read one row of the schema of ARC and CommonsenseQA.

    Args:
        row: `id`, `question`, `choices` (`text` and `label` of each) and `answerKey`. Labels may
            be letters or numbers, of any count from 2.
        task: The task's name.

    Returns:
        The question; the right option is where the answer key stands among the labels.

    Raises:
        TaskError: What is missing or wrong, without file and line.
    """
    options = row.get("choices")
    if not isinstance(options, Mapping):
        raise TaskError(f"'choices' is {options!r}; expected an object with 'text' and 'label'")
    choices = texts_of(options, "text", minimum=2)
    labels = texts_of(options, "label", minimum=2)
    if len(choices) != len(labels) or len(set(labels)) != len(labels):
        raise TaskError(f"{len(choices)} options have the labels {', '.join(labels)}")
    if len(choices) > len(LETTERS):
        raise TaskError(f"'choices' has {len(choices)} options; at most {len(LETTERS)} are usable")
    key = text_of(row, "answerKey")
    if key not in labels:
        raise TaskError(f"'answerKey' is {key!r}; expected one of {', '.join(labels)}")
    gold = labels.index(key)
    return Example(
        id=text_of(row, "id"),
        task=task,
        question=text_of(row, "question"),
        choices=choices,
        gold=gold,
        answer=choices[gold],
    )
