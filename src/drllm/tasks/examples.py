"""Questions and prompts: the texts that a task returns.

A task never sees a model or a tokenizer. This module doesn't import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias, TypeVar

Item = TypeVar("Item")

Row: TypeAlias = Mapping[str, Any]
"""One object of a task's file, with the columns of the hub's data set or of the user's file."""

QuestionRow: TypeAlias = tuple["Example", Row]  # a question, and the row that has the question

FILE_NAMES = (".jsonl", ".jsonl.gz")  # endings of the names of question files

OPTIONS_REWARD = "loglikelihood"
"""The default reward of every task with options; evaluations of these tasks use no other."""
KL_REWARD = "kl"  # the reward of prompts without answers: the KL from the full path

Messages: TypeAlias = tuple[tuple[str, str], ...]
"""A conversation that ends with the user: the role and the content of each message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question with its answer.

    Attributes:
        id: Unique within the task.
        task: The task's name.
        question: The question's text alone, without instructions or options.
        choices: The options' texts; empty if the answer can only be generated.
        gold: Index of the right option; None without options.
        answer: The right answer's text.
        other_answers: Other right answers, if the answer is generated.
        solution: The steps that lead to the answer, and the answer at the end; empty for most
            questions.
        context: The text before the question: a passage, or a line on the subject. Empty for most
            questions. Two questions with the same text and different contexts count as equal.
        messages: The conversation, if the prompt is a conversation; `question` is then its text.
    """

    id: str = ""
    task: str = ""
    question: str
    choices: tuple[str, ...] = ()
    gold: int | None = None
    answer: str
    other_answers: tuple[str, ...] = ()
    solution: str = ""
    context: str = ""
    messages: Messages = field(default=(), repr=False)


def with_options(
    question: str, choices: tuple[str, ...], gold: int, row_id: str = "", task: str = ""
) -> Example:
    """Return a question with options; its answer is the text of the right option."""
    return Example(
        id=row_id, task=task, question=question, choices=choices, gold=gold, answer=choices[gold]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt for an example: what the model reads, and what counts as right."""

    text: str  # what the model reads; routers see nothing else
    reward: str  # `loglikelihood` (score `continuations`), or how a generated answer is graded
    answer: str  # the right answer, for `letter` its letter
    other_answers: tuple[str, ...] = ()  # for `exact`, other right answers
    # For `loglikelihood`, the texts that follow `text` directly, each with its leading space; else
    # empty.
    continuations: tuple[str, ...] = ()
    gold: int | None = None  # index of the right continuation; None for generated answers
    # Whether `text` is the user's turn of the chat template, if the tokenizer has a chat template.
    chat: bool = False
    max_new_tokens: int = 16  # maximum tokens of a generated answer
    # Whether the score of a continuation is its log-probability per character (as in `acc_norm` of
    # lm-evaluation-harness) and not the sum. True only in re-tests.
    normalised: bool = False
    letters: str = "ABCDE"  # for `letter`, the letters that name an option
    # For each continuation, the beginning that is read but not scored, such as the text that fills
    # a gap; empty for none. This field and the fields below stay out of the repr, since the repr
    # identifies searches of earlier versions.
    unscored: tuple[str, ...] = field(default=(), repr=False)
    # The question alone, if a function grades the answer; else empty.
    question: str = field(default="", repr=False)
    # The conversation that the chat template renders instead of `text`.
    messages: Messages = field(default=(), repr=False)

    @property
    def content(self) -> str | list[dict[str, str]]:
        """What the model reads: the text, or the messages of a conversation."""
        if self.messages:
            return [{"role": role, "content": text} for role, text in self.messages]
        return self.text


def choose(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """Draw at most `limit` items at random, and return them in their order.

    The drawn places depend only on the seed, the limit and the number of items.
    """
    if limit is None or limit >= len(items):
        return list(items)
    places = sorted(Random(seed).sample(range(len(items)), limit))
    return [items[place] for place in places]
