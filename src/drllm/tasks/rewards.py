"""Rewards, which decide whether an answer is right.

A reward grades generated answers, or scores the options of a question. It is a class that is
decorated with `@REWARDS.register("name")`. This module doesn't import torch.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from drllm.config.constants import PYTHON_FUNCTION
from drllm.errors import TaskError
from drllm.extras import need
from drllm.registry import Registry
from drllm.tasks.equality import have_same_value
from drllm.tasks.examples import Prompt
from drllm.tasks.graded import grade_by_function

_OPENING_MARKS = " \t\"'`*_“”‘’«»"
_CLOSING_MARKS = _OPENING_MARKS + ".,;:!?"
_UNFINISHED_CHARACTER = "\ufffd"
"""The text that tokenizers return for a character whose last bytes are still missing."""


class Reward:
    """A way of grading answers; `drllm ls` shows the first line of each reward's docstring.

    Attributes:
        scores_options: Whether the prompt's continuations are scored; else an answer is generated.
        needs: The extra of this package that must be installed; empty if the reward needs none.
    """

    scores_options: ClassVar[bool] = False
    needs: ClassVar[str] = ""

    def verdict(self, prompt: Prompt, text: str, finished: bool) -> float | None:
        """Return the grade of an answer to a prompt of this reward; see the function `verdict`."""
        raise ValueError(f"reward {prompt.reward!r} does not grade generated answers")

    def gold_text(self, prompt: Prompt) -> str:
        """Return the right answer in the form that the prompt asks for."""
        return prompt.answer


REWARDS: Registry[type[Reward]] = Registry("reward", error=TaskError)


def check_installed(reward: str) -> None:
    """Raise a ConfigError if a reward needs packages that aren't installed."""
    if PYTHON_FUNCTION in reward:  # a function in a user's file
        return
    extra = REWARDS.get(reward).needs
    if extra:
        need(extra, f"reward {reward!r}")


def get_reward(prompt: Prompt) -> Reward:
    """Return the reward that a prompt names, which may be a function in a user's file."""
    if PYTHON_FUNCTION in prompt.reward:
        return _FunctionReward()
    return REWARDS.get(prompt.reward)()


def grade(prompt: Prompt, text: str) -> float:
    """Grade a finished answer: 1.0 if it is right, else 0.0; see `verdict`."""
    result = verdict(prompt, text, finished=True)
    assert result is not None
    return result


def verdict(prompt: Prompt, text: str, finished: bool) -> float | None:
    """Return the grade of a generated answer as soon as no continuation can change the grade.

    Until then the result is None. A finished answer always has a grade. The text has no special
    tokens.

    Source: Dr.LLM section 4 grades ARC by a letter pattern and DART by a box; stopping at the
        verdict is ours.
    """
    if not finished:
        text = text.rstrip(_UNFINISHED_CHARACTER)
    return get_reward(prompt).verdict(prompt, text, finished)


def score_choices(logprobs: Sequence[float], prompt: Prompt) -> tuple[float, float]:
    """Return the reward and the margin of a question from the log-probabilities of its options.

    The reward is 1.0 if the gold option has the best score, else 0.0. Among equal scores the first
    is the best, as in lm-evaluation-harness. The margin is the gold option's score minus the best
    score of the other options. A score is a log-probability. If the prompt is `normalised`, it is
    divided by the option's length in characters, without its leading space.

    Args:
        logprobs: The sum of each option's log-probabilities, in nats.
        prompt: The prompt; its `gold` is the right option's index.
    """
    assert prompt.gold is not None
    scores = list(logprobs)
    if prompt.normalised:
        lengths = [len(text.removeprefix(" ")) for text in prompt.continuations]
        scores = [score / length for score, length in zip(scores, lengths, strict=True)]
    wrong_scores = scores[: prompt.gold] + scores[prompt.gold + 1 :]
    is_right = scores.index(max(scores)) == prompt.gold
    return float(is_right), scores[prompt.gold] - max(wrong_scores)


class _FunctionReward(Reward):
    """A function in a user's file grades the whole answer."""

    def verdict(self, prompt: Prompt, text: str, finished: bool) -> float | None:
        """See `Reward.verdict`."""
        return grade_by_function(prompt, text) if finished else None


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
        letter = re.search(rf"(?<![^\W_])[{re.escape(prompt.letters)}](?![^\W_])", text)
        if letter is None:
            return 0.0 if finished else None
        if letter.end() == len(text) and not finished:
            return None  # the next character may turn the letter into a word
        return float(letter.group() == prompt.answer)


@REWARDS.register("boxed")
class Boxed(Reward):
    r"""The first `\boxed{...}` whose braces close holds the right value."""

    needs = "math"

    def verdict(self, prompt: Prompt, text: str, finished: bool) -> float | None:
        """See `Reward.verdict`."""
        content = first_boxed(text)
        if content is None:
            return 0.0 if finished else None
        return float(have_same_value(prompt.answer, content))

    def gold_text(self, prompt: Prompt) -> str:
        """Return the answer in a box."""
        return f"\\boxed{{{prompt.answer}}}"


@REWARDS.register("exact")
class Exact(Reward):
    """The first line that isn't blank equals an answer."""

    def verdict(self, prompt: Prompt, text: str, finished: bool) -> float | None:
        """See `Reward.verdict`."""
        first_line, *further_text = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)
        golds = {normalise(answer) for answer in (prompt.answer, *prompt.other_answers)}
        if finished or further_text:
            return float(normalise(first_line) in golds)
        # White space at the end may separate this word from the next: keep one space.
        beginning = re.sub(r"\s+", " ", first_line).casefold().lstrip(_OPENING_MARKS)
        if any(_may_become(beginning, gold) for gold in golds):
            return None
        return 0.0


def _may_become(beginning: str, gold: str) -> bool:
    """Tell whether a line that begins like this may still equal a gold answer at its end.

    It may if it is a beginning of the answer, or the whole answer with nothing but marks behind it.
    """
    if gold.startswith(beginning):
        return True
    return beginning.startswith(gold) and not beginning.removeprefix(gold).strip(_CLOSING_MARKS)


def first_boxed(text: str) -> str | None:
    r"""Return the content of the first `\boxed{…}` that closes, or None."""
    # For each open brace, the place where a box's content starts; None for other braces.
    open_braces: list[int | None] = []
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        mark = token.group()
        if mark == "{":
            open_braces.append(None)
        elif mark == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                return text[start : token.start()]
        elif mark.startswith("\\boxed"):
            open_braces.append(token.end())
    return None


def normalise(answer: str) -> str:
    """Return an answer with folded case and single spaces, and without marks around it."""
    return " ".join(answer.split()).casefold().lstrip(_OPENING_MARKS).rstrip(_CLOSING_MARKS)
