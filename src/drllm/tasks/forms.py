r"""How questions are asked in a search: scored options, or generated answers.

The prompts of `OPTIONS` under `loglikelihood` are byte for byte what lm-evaluation-harness renders
for ARC and PIQA, and in its cloze form for MMLU. Loads no torch.
"""

from dataclasses import dataclass, replace

from drllm.tasks.base import OPTIONS_REWARD, Example, Prompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_TEMPLATE = (
    "Answer the following multiple-choice question with the letter of the right option only.\n\n"
    "Question: {question}\n{options}\nAnswer:"
)
LETTER_TOKENS = 10
"""Maximum tokens of a letter answer (Dr.LLM section 4; docs/differences.md, D-34)."""
BOXED_TOKENS = 15
"""Maximum tokens of a boxed answer; no room for a chain of thought (Dr.LLM section 4)."""
ANSWER_TOKENS = 16  # what other answers may have at least; more where a right one is longer


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the questions of a task are asked in a search."""

    # The rewards that fit, the default first: `loglikelihood` scores the options' texts, `letter`
    # asks for one of their letters, others grade a generated answer. None where the questions are
    # prompts without answers.
    rewards: tuple[str, ...]
    # Around `{question}` and, for generated answers, `{context}`: as asked, then for the re-tests.
    templates: tuple[str, ...]
    # Maximum tokens of an answer; None: what its longest right answer needs.
    max_new_tokens: int | None = None
    letters: str = "ABCDE"  # those that may be answered, where options stand in the question

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return how a question is asked for one of the rewards, then other ways of asking it.

        Besides in other templates, options are scored by character; a letter is asked for in every
        rotation of the options, so that the right one moves.
        """
        if reward == OPTIONS_REWARD:
            asked = tuple(_scored_prompt(example, template) for template in self.templates)
            return (*asked, replace(asked[0], normalised=True))
        if reward == "letter" and example.choices:
            return tuple(_letter_prompt(example, place) for place in range(len(example.choices)))
        right = (example.answer, *example.other_answers)
        longest = 8 + max(len(answer.encode()) for answer in right)  # a token has a byte at least
        return tuple(
            Prompt(
                text=template.format(question=example.question, context=example.context),
                reward=reward,
                answer=example.answer,
                other_answers=example.other_answers,
                chat=True,
                max_new_tokens=self.max_new_tokens or max(ANSWER_TOKENS, longest),
                letters=self.letters,
                messages=example.messages,
            )
            for template in self.templates
        )


class GapForm(Form):
    """How questions with a gap (`_`) are asked: each option fills it, what follows it is scored.

    Source: Trinh and Le (arXiv 1806.02847), as lm-evaluation-harness' WinoGrande has it.
    """

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return how a question is asked, then in other templates."""
        found, asked = [], _scored_prompt(example, "")
        for template in self.templates:
            before, _, after = template.format(question=example.question).partition("_")
            text = before.rstrip()
            fillings = tuple(f"{before[len(text) :]}{choice}" for choice in example.choices)
            filled = tuple(f"{filling} {after.strip()}" for filling in fillings)
            found.append(replace(asked, text=text, continuations=filled, unscored=fillings))
        return tuple(found)


OPTIONS = Form(
    rewards=(OPTIONS_REWARD, "letter"),
    templates=(
        "Question: {question}\nAnswer:",
        "Q: {question}\nA:",
        "{question}\nThe correct answer is:",
        "Answer the following question.\n\n{question}\n\nAnswer:",
    ),
)
BOXED = Form(
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
WORKED = Form(  # `boxed` with room for a chain of thought
    rewards=("boxed",),
    templates=(
        "{question}\n\nThink step by step, and give the final answer as \\boxed{{answer}}.",
        "Solve this problem step by step, with the result in \\boxed{{}}.\n\nProblem: {question}",
        "Question: {question}\nWork out the answer, then write it in the form \\boxed{{answer}}.",
    ),
)
GAP = GapForm(rewards=(OPTIONS_REWARD,), templates=("{question}", "Text: {question}"))


def _scored_prompt(example: Example, template: str) -> Prompt:
    return Prompt(
        text=in_context(example, template.format(question=example.question)),
        reward=OPTIONS_REWARD,
        answer=example.answer,
        continuations=tuple(f" {choice}" for choice in example.choices),
        gold=example.gold,
    )


def _letter_prompt(example: Example, rotation: int) -> Prompt:
    """Return a prompt that lists the options, lettered, `rotation` of them moved to the end."""
    assert example.gold is not None
    choices = example.choices[rotation:] + example.choices[:rotation]
    letters = LETTERS[: len(choices)]
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))
    text = LETTER_TEMPLATE.format(question=example.question, options=options)
    return Prompt(
        text=in_context(example, text),
        reward="letter",
        answer=letters[(example.gold - rotation) % len(choices)],
        chat=True,
        max_new_tokens=LETTER_TOKENS,
        letters=letters,
    )


def in_context(example: Example, text: str) -> str:
    """Return a text with what stands before the question, if anything does."""
    return f"{example.context}\n\n{text}" if example.context else text
