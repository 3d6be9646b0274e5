r"""Prompt formats: how a search turns a task's questions into prompts, for each reward.

For `loglikelihood`, the prompts of `OPTIONS` are byte for byte the prompts of lm-evaluation-harness
for ARC, PIQA and the cloze form of MMLU. This module doesn't import torch.
"""

from dataclasses import dataclass, replace

from drllm.tasks.examples import OPTIONS_REWARD, Example, Prompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_TEMPLATE = (
    "Answer the following multiple-choice question with the letter of the right option only.\n\n"
    "Question: {question}\n{options}\nAnswer:"
)
LETTER_TOKENS = 10
"""Maximum tokens of a letter answer (Dr.LLM section 4; docs/differences.md, D-34)."""
BOXED_TOKENS = 15
"""Maximum tokens of a boxed answer, without room for a chain of thought (Dr.LLM section 4)."""
ANSWER_TOKENS = 16  # maximum tokens of other answers, unless the right answer may need more
SPARE_TOKENS = 8  # tokens that an answer may have beyond the bytes of the longest right answer


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """Makes the prompts of a search for the questions of a task.

    Attributes:
        rewards: The rewards that fit, the default first. `loglikelihood` scores the options' texts,
            `letter` asks for an option's letter, and other rewards grade a generated answer.
            Prompts without answers have only `kl`.
        templates: Texts around `{question}` and, for generated answers, `{context}`. The first
            template is for the search; all further templates are for the re-test.
        max_new_tokens: Maximum tokens of an answer; None allows the longest right answer and a few
            tokens more.
        letters: Letters that an answer may name, if the question's text lists the options.
    """

    rewards: tuple[str, ...]
    templates: tuple[str, ...]
    max_new_tokens: int | None = None
    letters: str = "ABCDE"

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the prompt of a question for a reward, then the prompts of the re-test.

        The re-test uses the other templates. For scored options its last prompt is the first one
        again, with scores by character. For letters it has a prompt for every rotation of the
        options, so the right letter changes.
        """
        if reward == OPTIONS_REWARD:
            prompts = [_scored_prompt(example, template) for template in self.templates]
            by_character = replace(prompts[0], normalised=True)
            return (*prompts, by_character)
        if reward == "letter" and example.choices:
            rotations = range(len(example.choices))
            return tuple(_letter_prompt(example, rotation) for rotation in rotations)
        return tuple(
            self._generated_prompt(example, reward, template) for template in self.templates
        )

    def _generated_prompt(self, example: Example, reward: str, template: str) -> Prompt:
        return Prompt(
            text=template.format(question=example.question, context=example.context),
            reward=reward,
            answer=example.answer,
            other_answers=example.other_answers,
            chat=True,
            max_new_tokens=self.max_new_tokens or _tokens_needed(example),
            letters=self.letters,
            messages=example.messages,
        )


class GapFormat(PromptFormat):
    """Questions with a gap (`_`): each option fills the gap, and the text after the gap is scored.

    Source: Trinh and Le (arXiv 1806.02847), as in lm-evaluation-harness' WinoGrande.
    """

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the prompt of a question, then its prompts for the re-test; see `PromptFormat`."""
        return tuple(_gap_prompt(example, template) for template in self.templates)


OPTIONS = PromptFormat(
    rewards=(OPTIONS_REWARD, "letter"),
    templates=(
        "Question: {question}\nAnswer:",
        "Q: {question}\nA:",
        "{question}\nThe correct answer is:",
        "Answer the following question.\n\n{question}\n\nAnswer:",
    ),
)
BOXED = PromptFormat(
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
WORKED = PromptFormat(  # boxed answers with room for a chain of thought
    rewards=("boxed",),
    templates=(
        "{question}\n\nThink step by step, and give the final answer as \\boxed{{answer}}.",
        "Solve this problem step by step, with the result in \\boxed{{}}.\n\nProblem: {question}",
        "Question: {question}\nWork out the answer, then write it in the form \\boxed{{answer}}.",
    ),
)
GAP = GapFormat(rewards=(OPTIONS_REWARD,), templates=("{question}", "Text: {question}"))


def _scored_prompt(example: Example, template: str) -> Prompt:
    return Prompt(
        text=add_context(example, template.format(question=example.question)),
        reward=OPTIONS_REWARD,
        answer=example.answer,
        continuations=tuple(f" {choice}" for choice in example.choices),
        gold=example.gold,
    )


def _tokens_needed(example: Example) -> int:
    """Return a limit of tokens that leaves room for the longest right answer."""
    answers = (example.answer, *example.other_answers)
    most_bytes = max(len(answer.encode()) for answer in answers)  # a token has at least one byte
    return max(ANSWER_TOKENS, most_bytes + SPARE_TOKENS)


def _gap_prompt(example: Example, template: str) -> Prompt:
    """Return a prompt that ends before the gap.

    For "Ann thanked _ for the cake." the prompt is "Ann thanked", and the continuation with option
    "Bo" is " Bo for the cake."; " Bo" isn't scored.
    """
    before, _, after = template.format(question=example.question).partition("_")
    text = before.rstrip()
    space = before[len(text) :]
    fillings = tuple(f"{space}{choice}" for choice in example.choices)
    continuations = tuple(f"{filling} {after.strip()}" for filling in fillings)
    prompt = _scored_prompt(example, "")
    return replace(prompt, text=text, continuations=continuations, unscored=fillings)


def _letter_prompt(example: Example, rotation: int) -> Prompt:
    """Return a prompt that lists the options by letter.

    The first `rotation` options are moved to the end of the list.
    """
    assert example.gold is not None
    choices = example.choices[rotation:] + example.choices[:rotation]
    letters = LETTERS[: len(choices)]
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))
    text = LETTER_TEMPLATE.format(question=example.question, options=options)
    return Prompt(
        text=add_context(example, text),
        reward="letter",
        answer=letters[(example.gold - rotation) % len(choices)],
        chat=True,
        max_new_tokens=LETTER_TOKENS,
        letters=letters,
    )


def add_context(example: Example, text: str) -> str:
    """Return a text with the example's context before it, if the example has a context."""
    if not example.context:
        return text
    return f"{example.context}\n\n{text}"
