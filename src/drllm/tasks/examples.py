"""Questions and prompts: what a task hands out.

A task never sees a model or a tokenizer: it hands out texts. Loads no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias, TypeVar

Item = TypeVar("Item")

Row: TypeAlias = Mapping[str, Any]
"""One object of a task's file, in the schema of the hub or of a data folder."""

QuestionRow: TypeAlias = tuple["Example", Row]  # a question, and the row that it was read from

FILE_NAMES = (".jsonl", ".jsonl.gz")  # how the name of a file of questions ends

OPTIONS_REWARD = "loglikelihood"
"""The reward of every task that has options, and the one that an evaluation uses."""
KL_REWARD = "kl"  # the reward of prompts without answers: how near a path stays to the full one

Messages: TypeAlias = tuple[tuple[str, str], ...]
"""A conversation that ends with the user: role and content of each message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question with its answer.

    Attributes:
        id: Unique within the task.
        task: The task's name.
        question: The question's text alone, without instructions or options.
        choices: The options' texts; empty where the answer can only be generated.
        gold: Index of the right option; None without options.
        answer: The right answer's text.
        other_answers: Other right answers, where the answer is generated.
        solution: How the answer is found, ending in it; empty for most.
        context: The text before the question: the passage that it asks about, or a line on its
            subject. Empty for most; two questions are the same by the question's text alone.
        messages: The conversation, for a prompt that is one; `question` then has its text.
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
    """Return a question with options; its answer is the right one's text."""
    return Example(
        id=row_id, task=task, question=question, choices=choices, gold=gold, answer=choices[gold]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One way of asking an example: what the model reads, and what counts as right."""

    text: str  # what the model reads; the routers see this and nothing else
    reward: str  # `loglikelihood` (score `continuations`), or how a generated answer is graded
    answer: str  # what a generated answer is graded against (for `letter`, the letter)
    other_answers: tuple[str, ...] = ()  # for `exact`, further answers that are as right
    # For `loglikelihood`, the texts that follow `text` directly, each with its leading space; else
    # empty.
    continuations: tuple[str, ...] = ()
    gold: int | None = None  # index of the right continuation; None for generated answers
    # Send `text` as the user's turn of the tokenizer's chat template, where it has one.
    chat: bool = False
    max_new_tokens: int = 16  # maximum tokens of a generated answer
    # Score continuations by log-probability per character (as `acc_norm` of lm-evaluation-harness
    # does), not by their sum. Only re-tests ask for it.
    normalised: bool = False
    letters: str = "ABCDE"  # for `letter`, the letters that name an option
    # Of each continuation, the text that it begins with and that is read but not scored: of a gap
    # that is filled, the filling. Empty for none. This and what follows isn't in the repr, by which
    # a search knows its prompts, those of earlier versions too.
    unscored: tuple[str, ...] = field(default=(), repr=False)
    # The question alone, for a function that grades; else empty.
    question: str = field(default="", repr=False)
    # The conversation, which the chat template renders in place of `text`.
    messages: Messages = field(default=(), repr=False)

    @property
    def content(self) -> str | list[dict[str, str]]:
        """What the model reads: the text, or the messages of a conversation."""
        if self.messages:
            return [{"role": role, "content": text} for role, text in self.messages]
        return self.text


def choose(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """Return at most `limit` items, drawn with the seed, in their own order.

    Which places are drawn depends on how many items there are, not on what they hold.
    """
    if limit is None or limit >= len(items):
        return list(items)
    places = sorted(Random(seed).sample(range(len(items)), limit))
    return [items[place] for place in places]
