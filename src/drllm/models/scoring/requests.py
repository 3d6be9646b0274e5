"""What is scored, and the result: a `Request`, and the `Outcome` of one path on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Tokens: TypeAlias = Sequence[int]

Grader: TypeAlias = Callable[[str, bool], float | None]
"""A function that grades a generated answer. Its arguments are the text so far, and whether the
text is complete. It returns the grade, or None if it can't grade the text yet. A complete text must
get a grade."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, with the continuations to score after it or the limit of the answer to generate.

    Without continuations and without a limit, only the prompt is read, to measure a path's KL.

    Attributes:
        context: The tokens of the prompt, at least one.
        continuations: The tokens of each continuation, at least one token each.
        num_unscored: For each continuation, the number of its first tokens that are read but not
            scored. Empty if all tokens are scored. Example: WinoGrande fills a gap with each option
            and scores the text after the gap. The option isn't scored, but it isn't a part of the
            prompt either.
        max_new_tokens: The maximum number of tokens of the generated answer; None if no answer is
            generated.
        grader: Grades the answer, which stops as soon as it is graded. Without a grader the answer
            goes on to its end or limit.
    """

    context: Tokens
    continuations: Sequence[Tokens] = ()
    num_unscored: Sequence[int] = ()
    max_new_tokens: int | None = None
    grader: Grader | None = None

    @classmethod
    def from_text(cls, tokens: Tokens) -> "Request":
        """Return the request that scores a text of at least two tokens.

        The first token isn't scored, since nothing predicts it.
        """
        return cls(tokens[:1], [tokens[1:]])

    @property
    def is_generated(self) -> bool:
        """Whether an answer is generated."""
        return self.max_new_tokens is not None

    @property
    def scored_from(self) -> list[int]:
        """For each continuation, the place of its first scored token; 0 by default."""
        return list(self.num_unscored) or [0] * len(self.continuations)

    @property
    def num_after(self) -> int:
        """Number of tokens to read after the context: a continuation's last token isn't read."""
        return sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def length(self) -> int:
        """Number of tokens to read: one copy of the context, and all continuations."""
        return len(self.context) + self.num_after

    @property
    def is_plain(self) -> bool:
        """Whether the row is an ordinary text: at most one continuation has tokens to read."""
        return sum(len(tokens) > 1 for tokens in self.continuations) <= 1

    def split(self) -> "list[Request]":
        """Return plain requests with the same scores: this one, or one for each continuation."""
        if self.is_plain:
            return [self]
        return [
            Request(self.context, [tokens], [first])
            for tokens, first in zip(self.continuations, self.scored_from, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a path did on a request. Log-probabilities are in nats.

    Attributes:
        logprobs: The log-probability of each continuation: the sum over its scored tokens.
        greedy: For each continuation, whether each scored token is the likeliest. Empty if it isn't
            requested.
        kl: The mean KL from the full path over the prompt's tokens, in nats per token. None if it
            isn't requested or isn't finite.
        answer: The generated text, up to the token that decided the grade; None if no answer is
            generated.
        tokens: The tokens of the answer, without the end-of-sequence token.
        grade: The grade of the answer; None without an answer or a grader.
        logprob: The mean log-probability of these tokens and the end-of-sequence token; None if no
            answer is generated.
    """

    logprobs: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()
    kl: float | None = None
    answer: str | None = None
    tokens: tuple[int, ...] = ()
    grade: float | None = None
    logprob: float | None = None
