"""Rewards: what counts as a right answer.

A reward grades generated answers, or scores a question's options. Adding one is one class here (or
in a module that `REWARDS` names), under `@REWARDS.register("name")`. Whether two expressions are
equal is decided in `equality`. Loads no torch.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from drllm.errors import TaskError
from drllm.extras import need
from drllm.registry import Registry
from drllm.tasks.base import Prompt
from drllm.tasks.equality import same_value
from drllm.tasks.graded import SUFFIX, graded

_OPENING_MARKS = " \t\"'`*_“”‘’«»"
_CLOSING_MARKS = _OPENING_MARKS + ".,;:!?"
_UNFINISHED_CHARACTER = "\ufffd"
"""What tokenizers show for the first bytes of a character whose other bytes are still to come."""


class Reward:
    """How answers are graded; the first line of a reward's docstring is what `drllm ls` shows.

    Attributes:
        scores_options: The prompt's continuations are scored; else an answer is generated.
        needs: An extra whose packages it needs; empty if it needs none.
    """

    scores_options: ClassVar[bool] = False
    needs: ClassVar[str] = ""

    def verdict(self, prompt: Prompt, text: str, finished: bool) -> float | None:
        """Return what the function `verdict` does, for prompts of this reward."""
        raise ValueError(f"reward {prompt.reward!r} does not grade generated answers")

    def gold_text(self, prompt: Prompt) -> str:
        """Return the right answer in the form that the prompt asks for."""
        return prompt.answer


REWARDS: Registry[type[Reward]] = Registry("reward", error=TaskError)


def check_installed(reward: str) -> None:
    """Refuse, by ConfigError, a reward that needs packages that aren't installed."""
    if SUFFIX not in reward and (extra := REWARDS.get(reward).needs):
        need(extra, f"reward {reward!r}")


def reward_of(prompt: Prompt) -> Reward:
    """Return the reward that a prompt names, which may be a function of the user's own."""
    return _Function() if SUFFIX in prompt.reward else REWARDS.get(prompt.reward)()


def grade(prompt: Prompt, text: str) -> float:
    """Grade a finished answer: 1.0 if it is right, else 0.0; see `verdict`."""
    result = verdict(prompt, text, finished=True)
    assert result is not None
    return result


def verdict(prompt: Prompt, text: str, finished: bool) -> float | None:
    """Return the grade of a generated answer once no continuation of the text can change it.

    The text is without special tokens. None while the grade is open, never when finished.

    Source: Dr.LLM section 4 grades ARC by a letter pattern and DART by a box; stopping at the
        verdict is ours.
    """
    known = text if finished else text.rstrip(_UNFINISHED_CHARACTER)
    return reward_of(prompt).verdict(prompt, known, finished)


def score_choices(logprobs: Sequence[float], prompt: Prompt) -> tuple[float, float]:
    """Return reward and margin of a multiple-choice question from its options' log-probabilities.

    Those are sums in nats; where the prompt is `normalised` each is divided by the option's length
    in characters, without its leading space. The reward is 1.0 if the gold option is the best (of
    equal ones the first is, as in lm-evaluation-harness); the margin is its score minus the best
    other's.
    """
    assert prompt.gold is not None
    scores = list(logprobs)
    if prompt.normalised:
        lengths = [len(text.removeprefix(" ")) for text in prompt.continuations]
        scores = [score / length for score, length in zip(scores, lengths, strict=True)]
    others = scores[: prompt.gold] + scores[prompt.gold + 1 :]
    right = scores.index(max(scores)) == prompt.gold
    return float(right), scores[prompt.gold] - max(others)


class _Function(Reward):
    """What a function of the user's own says of the whole answer."""

    def verdict(self, prompt: Prompt, text: str, finished: bool) -> float | None:
        """See `Reward.verdict`."""
        return graded(prompt, text) if finished else None


@REWARDS.register("loglikelihood")
class Loglikelihood(Reward):
    """The right option is the likeliest."""

    scores_options = True


@REWARDS.register("kl")
class Kl(Reward):
    """For prompts without answers: exp(-KL) / 2, so that no path counts as right."""

    scores_options = True


@REWARDS.register("letter")
class Letter(Reward):
    """The first option letter that stands alone is the right one (docs/differences.md, D-34)."""

    def verdict(self, prompt: Prompt, text: str, finished: bool) -> float | None:
        """See `Reward.verdict`."""
        # A letter or digit is a word character other than the underscore (_B_ stands alone).
        alone = re.search(rf"(?<![^\W_])[{re.escape(prompt.letters)}](?![^\W_])", text)
        if alone is None:
            return 0.0 if finished else None
        if alone.end() == len(text) and not finished:
            return None  # the next character may make a word of it
        return float(alone.group() == prompt.answer)


@REWARDS.register("boxed")
class Boxed(Reward):
    r"""The first `\boxed{...}` whose braces close holds the right value."""

    needs = "math"

    def verdict(self, prompt: Prompt, text: str, finished: bool) -> float | None:
        """See `Reward.verdict`."""
        content = first_boxed(text)
        if content is None:
            return 0.0 if finished else None
        return float(same_value(prompt.answer, content))

    def gold_text(self, prompt: Prompt) -> str:
        """Return the answer in a box."""
        return f"\\boxed{{{prompt.answer}}}"


@REWARDS.register("exact")
class Exact(Reward):
    """The first line that isn't blank equals an answer."""

    def verdict(self, prompt: Prompt, text: str, finished: bool) -> float | None:
        """See `Reward.verdict`."""
        first, *rest = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)
        golds = {normalise(answer) for answer in (prompt.answer, *prompt.other_answers)}
        if finished or rest:
            return float(normalise(first) in golds)
        # White space at the end may stand between this and the next word: keep one space of it.
        begun = re.sub(r"\s+", " ", first).casefold().lstrip(_OPENING_MARKS)
        for gold in golds:
            if gold.startswith(begun):
                return None
            if begun.startswith(gold) and not begun[len(gold) :].strip(_CLOSING_MARKS):
                return None
        return 0.0


def first_boxed(text: str) -> str | None:
    r"""Return the content of the first `\boxed{…}` that closes, or None."""
    open_braces: list[int | None] = []  # where a box's content starts; None for other braces
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        found = token.group()
        if found == "{":
            open_braces.append(None)
        elif found == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                return text[start : token.start()]
        elif found.startswith("\\boxed"):
            open_braces.append(token.end())
    return None


def normalise(answer: str) -> str:
    """Return an answer without what doesn't count: case, outer marks, runs of white space."""
    return " ".join(answer.split()).casefold().lstrip(_OPENING_MARKS).rstrip(_CLOSING_MARKS)
