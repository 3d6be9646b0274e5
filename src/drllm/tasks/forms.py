r"""How questions are asked in a search: scored options, or generated answers.

The prompts of `Options` under `loglikelihood` are byte for byte what lm-evaluation-harness renders
for ARC and PIQA, and in its cloze form for MMLU. Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from drllm.tasks.base import OPTIONS_REWARD, Example, Form, Prompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_TEMPLATE = (
    "Answer the following multiple-choice question with the letter of the right option only.\n\n"
    "Question: {question}\n{options}\nAnswer:"
)
LETTER_TOKENS = 10
"""Maximum tokens of a letter answer (Dr.LLM section 4)."""
BOXED_TOKENS = 15
"""Maximum tokens of a boxed answer; no room for a chain of thought (Dr.LLM section 4)."""
ANSWER_TOKENS = 16
"""What other answers may have at least; more where a right one is longer."""


@dataclass(frozen=True, kw_only=True)
class Options(Form):
    """Questions with options: `loglikelihood` scores their texts, `letter` asks for a letter.

    Attributes:
        template: What stands around the question where the options' texts are scored.
        other_templates: Others, for the re-test.
    """

    template: str = "Question: {question}\nAnswer:"
    other_templates: tuple[str, ...] = (
        "Q: {question}\nA:",
        "{question}\nThe correct answer is:",
        "Answer the following question.\n\n{question}\n\nAnswer:",
    )
    rewards: tuple[str, ...] = (OPTIONS_REWARD, "letter")

    def prompt(self, example: Example, reward: str) -> Prompt:
        """Return the question, with its options listed for `letter` only."""
        if reward == "letter":
            return _letter_prompt(example, rotation=0)
        return _scored_prompt(example, self.template)

    def retests(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the other ways of asking the same question.

        For `loglikelihood` the other templates and the first one scored by character; for
        `letter` every other rotation of the options, so that the right letter moves.
        """
        if reward == "letter":
            return tuple(
                _letter_prompt(example, rotation) for rotation in range(1, len(example.choices))
            )
        return (
            *(_scored_prompt(example, template) for template in self.other_templates),
            _scored_prompt(example, self.template, normalised=True),
        )


@dataclass(frozen=True, kw_only=True)
class Generated(Form):
    """Questions that are answered by generating, through the chat template.

    Attributes:
        rewards: How answers are graded: `letter`, `boxed` or `exact` alone.
        template: Around `{question}` and, where there is one, `{context}`.
        other_templates: Others, for the re-test.
        max_new_tokens: Maximum tokens of an answer; None: what its longest right answer needs.
        letters: For `letter`, those that may be answered.
    """

    rewards: tuple[str, ...]
    template: str
    other_templates: tuple[str, ...]
    max_new_tokens: int | None = None
    letters: str = "ABCDE"

    def prompt(self, example: Example, reward: str) -> Prompt:
        """Return the question in the first template."""
        return self._prompt(example, self.template)

    def retests(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the question in the other templates."""
        return tuple(self._prompt(example, template) for template in self.other_templates)

    def _prompt(self, example: Example, template: str) -> Prompt:
        right = (example.answer, *example.other_answers)
        longest = 8 + max(len(answer.encode()) for answer in right)  # a token has a byte at least
        return Prompt(
            text=template.format(question=example.question, context=example.context),
            reward=self.rewards[0],
            answer=example.answer,
            other_answers=example.other_answers,
            chat=True,
            max_new_tokens=self.max_new_tokens or max(ANSWER_TOKENS, longest),
            letters=self.letters,
        )


BOXED = Generated(
    rewards=("boxed",),
    template="{question}\n\nGive the final answer only, as \\boxed{{answer}}, with no explanation.",
    other_templates=(
        "Solve this problem and write nothing but the result in \\boxed{{}}.\n\n"
        "Problem: {question}",
        "Question: {question}\nReply with the final answer in the form \\boxed{{answer}} and no "
        "other words.",
    ),
    max_new_tokens=BOXED_TOKENS,
)
r"""Problems whose answer is a number or an expression in `\boxed{}`."""


def _scored_prompt(example: Example, template: str, *, normalised: bool = False) -> Prompt:
    """Return a prompt whose continuations are the options' texts, each after a space."""
    return Prompt(
        text=_in_context(example, template.format(question=example.question)),
        reward=OPTIONS_REWARD,
        answer=example.answer,
        continuations=tuple(f" {choice}" for choice in example.choices),
        gold=example.gold,
        normalised=normalised,
    )


def _letter_prompt(example: Example, rotation: int) -> Prompt:
    """Return a prompt that lists the options, lettered, `rotation` of them moved to the end."""
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
