"""Questions and prompts, which tasks return.

They are plain texts: a task never sees a model or a tokenizer. This module doesn't import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias, TypeVar

Item = TypeVar("Item")

Row: TypeAlias = Mapping[str, Any]
"""A row of a data set on the hub or of a question file: column → value."""

QuestionRow: TypeAlias = tuple["Example", Row]  # a question, and the row that it was read from

JSON_LINES = (".jsonl", ".jsonl.gz")  # endings of the names of files in JSON lines
FILE_ENDINGS = (
    *JSON_LINES,
    *(".json", ".json.gz"),
    *(".csv", ".csv.gz"),
    *(".tsv", ".tsv.gz"),
    ".parquet",
)
"""Endings of the names of question files."""

OPTIONS_REWARD = "loglikelihood"
"""The default reward of every task with options, and the only reward in their evaluations."""
KL_REWARD = "kl"  # the reward of prompts without answers: it compares a path with the full path

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
            questions. Questions with the same text count as copies, even if their contexts differ.
        messages: The conversation, if the user gave one; `question` is then the whole conversation
            as a text.
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
    # `loglikelihood` if `continuations` are scored; else the name of a reward that grades a
    # generated answer.
    reward: str
    answer: str  # the right answer; for `letter` its letter
    other_answers: tuple[str, ...] = ()  # for `exact`, other right answers
    # For `loglikelihood`, the texts that follow `text` directly, each with its leading space; else
    # empty.
    continuations: tuple[str, ...] = ()
    gold: int | None = None  # index of the right continuation; None for generated answers
    # Whether `text` is the user's turn of the chat template, if the tokenizer has a chat template.
    chat: bool = False
    max_new_tokens: int = 16  # maximum tokens of a generated answer
    # Whether the score of a continuation is its log-probability divided by its characters, as in
    # `acc_norm` of lm-evaluation-harness. True only in re-tests.
    normalised: bool = False
    letters: str = "ABCDE"  # for `letter`, the letters that name an option
    # This field and the fields below stay out of the repr, since the repr identifies searches of
    # earlier versions. For each continuation, the beginning that is read but not scored, such as
    # the text that fills a gap; empty if all of every continuation is scored.
    unscored: tuple[str, ...] = field(default=(), repr=False)
    # The question alone, if a function in a user's file grades the answer; else empty.
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

    The choice depends only on the seed, the limit and the number of items.
    """
    if limit is None or limit >= len(items):
        return list(items)
    places = sorted(Random(seed).sample(range(len(items)), limit))
    return [items[place] for place in places]
