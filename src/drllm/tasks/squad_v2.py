"""SQuAD 2.0: a question on a passage, answered in its words, or not answerable. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.errors import TaskError
from drllm.tasks.base import Example, Prompt
from drllm.tasks.grading import normalise
from drllm.tasks.published import PublishedTask
from drllm.tasks.rows import text_of, texts_of

UNANSWERABLE = "unanswerable"
"""What the prompt asks for where the passage holds no answer."""

TEMPLATE = (
    "Answer the question with as few words of the passage as possible and nothing else. "
    "If the passage doesn't hold the answer, reply: {unanswerable}\n\n"
    "Passage: {passage}\n\nQuestion: {question}"
)
OTHER_TEMPLATES = (
    "{passage}\n\n{question}\nReply with the shortest answer that stands in the text above, word "
    "for word. If there is none, the reply is {unanswerable}.",
    "Question: {question}\n\nLook it up in this text:\n{passage}\n\nGive the answer alone, in the "
    "words of the text, or {unanswerable} where the text doesn't say.",
)
ANSWER_TOKENS = 16
"""Fewest tokens that an answer is allowed; more where a right one is longer."""


class SquadV2(PublishedTask):
    """SQuAD 2.0 (Rajpurkar et al. 2018); right is any of the answers that people gave."""

    name = "squad_v2"
    description = "a passage's words as the answer, or that there is none (SQuAD 2.0)"
    rewards = ("exact",)
    repository = "rajpurkar/squad_v2"
    files: ClassVar = {"train": "train", "validation": "validation"}

    def read(self, row: Mapping[str, Any], row_id: str) -> Example | None:
        """Read a row with `id`, `context`, `question` and `answers` (`text`, a list).

        Returns:
            The question; its answer is `unanswerable` where the list is empty. None where all
            answers are nothing but marks, which can't be graded.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        answers = row.get("answers")
        if not isinstance(answers, Mapping):
            raise TaskError(f"'answers' is {answers!r}; expected an object with 'text'")
        texts = texts_of(answers, "text", minimum=0) or (UNANSWERABLE,)
        different: dict[str, str] = {}
        for text in texts:
            different.setdefault(normalise(text), text.strip())
        different.pop("", None)
        if not different:
            return None
        first, *others = different.values()
        return Example(
            id=text_of(row, "id"),
            task=self.name,
            question=text_of(row, "question").strip(),
            context=text_of(row, "context").strip(),
            answer=first,
            other_answers=tuple(others),
        )

    def prompt(self, example: Example, reward: str) -> Prompt:
        """Return the question behind its passage.

        Raises:
            TaskError: Another reward than `exact`.
        """
        self.check_reward(reward)
        return _prompt(example, TEMPLATE)

    def retests(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the question in two other templates.

        Raises:
            TaskError: Another reward than `exact`.

        Source: ours (docs/differences.md, D-05).
        """
        self.check_reward(reward)
        return tuple(_prompt(example, template) for template in OTHER_TEMPLATES)


def _prompt(example: Example, template: str) -> Prompt:
    right = (example.answer, *example.other_answers)
    longest = 8 + max(len(answer.encode()) for answer in right)  # no token is shorter than a byte
    return Prompt(
        text=template.format(
            passage=example.context, question=example.question, unanswerable=UNANSWERABLE
        ),
        reward="exact",
        answer=example.answer,
        other_answers=example.other_answers,
        chat=True,
        max_new_tokens=max(ANSWER_TOKENS, longest),
    )


SQUAD_V2 = SquadV2()
