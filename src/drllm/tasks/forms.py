r"""How questions are asked in a search: scored options, or generated answers.

The prompts of `Options` under `loglikelihood` are byte for byte what lm-evaluation-harness renders
for ARC and PIQA, and in its cloze form for MMLU. Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    They are asked again in the other templates and with the first one's scores by character; for
    a letter in every other rotation of the options, so that the right letter moves.

    Attributes:
        templates: What stands around the question where the options' texts are scored: as it is
            asked, then for the re-tests.
    """

    templates: tuple[str, ...] = (
        "Question: {question}\nAnswer:",
        "Q: {question}\nA:",
        "{question}\nThe correct answer is:",
        "Answer the following question.\n\n{question}\n\nAnswer:",
    )
    rewards: tuple[str, ...] = (OPTIONS_REWARD, "letter")

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """See `Form.prompts`."""
        if reward == "letter":
            return tuple(_letter_prompt(example, place) for place in range(len(example.choices)))
        asked = tuple(
            Prompt(
                text=_in_context(example, template.format(question=example.question)),
                reward=OPTIONS_REWARD,
                answer=example.answer,
                continuations=tuple(f" {choice}" for choice in example.choices),
                gold=example.gold,
            )
            for template in self.templates
        )
        return (*asked, replace(asked[0], normalised=True))


@dataclass(frozen=True, kw_only=True)
class Generated(Form):
    """Questions that are answered by generating, through the chat template.

    Attributes:
        rewards: How answers are graded: `letter`, `boxed` or `exact` alone.
        templates: Around `{question}` and, where there is one, `{context}`: as it is asked, then
            for the re-tests.
        max_new_tokens: Maximum tokens of an answer; None: what its longest right answer needs.
        letters: For `letter`, those that may be answered.
    """

    rewards: tuple[str, ...]
    templates: tuple[str, ...]
    max_new_tokens: int | None = None
    letters: str = "ABCDE"

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """See `Form.prompts`."""
        right = (example.answer, *example.other_answers)
        longest = 8 + max(len(answer.encode()) for answer in right)  # a token has a byte at least
        return tuple(
            Prompt(
                text=template.format(question=example.question, context=example.context),
                reward=self.rewards[0],
                answer=example.answer,
                other_answers=example.other_answers,
                chat=True,
                max_new_tokens=self.max_new_tokens or max(ANSWER_TOKENS, longest),
                letters=self.letters,
            )
            for template in self.templates
        )


BOXED = Generated(
    rewards=("boxed",),
    templates=(
        "{question}\n\nGive the final answer only, as \\boxed{{answer}}, with no explanation.",
        "Solve this problem and write nothing but the result in \\boxed{{}}.\n\n"
        "Problem: {question}",
        "Question: {question}\nReply with the final answer in the form \\boxed{{answer}} and no "
        "other words.",
    ),
    max_new_tokens=BOXED_TOKENS,
)
r"""Problems whose answer is a number or an expression in `\boxed{}`."""


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
