"""What a comparison of two systems shows, in numbers and in words.

`verdicts` makes these objects. Files hold them, and tables and sentences are made from them.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

from drllm.statistics import power
from drllm.statistics.ranges import Amount, Count, Share
from drllm.statistics.words import WORDS, Quantity, QuantityWords, signed

LABEL_MEANINGS = {
    "not shown": "no difference is shown",
    "too few": "too few questions or texts to tell",
    "no verdict": "base may be guessing",
}
"""Label of a difference that isn't shown → what it means."""

MAX_MORE_DIGITS = 3
"""How many more digits a number gets at most to tell it from a limit."""

Shown: TypeAlias = Literal["higher", "lower", "none shown", "too few", "guessing"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a comparison of two systems shows; `docs/formats.md` describes the fields.

    Differences are the first system minus the second. A higher `text_loss` is worse; of all other
    quantities a higher value is better. If no difference is shown, `shown` says why:

    - `none shown`: a difference of `target` would probably have been shown.
    - `too few`: it would probably not have been shown. `needed` questions or texts would show it
      with a probability of 80 %.
    - `guessing`: base isn't above chance, so nothing can be claimed.

    `won`, `lost` and `p` are None for means. If `p_corrected` isn't None, it decides instead of
    `p`. Every loss larger than `excluded_loss` is excluded. For `text_loss`, every larger increase
    is excluded. `excluded_loss` is None if no loss is excluded, and in files of earlier versions.
    """

    quantity: Quantity
    mean: float
    interval: tuple[float, float]
    n: Count
    shown: Shown
    won: Count | None = None
    lost: Count | None = None
    p: Share | None = None
    p_corrected: Share | None = None
    num_tests: Annotated[int, msgspec.Meta(ge=1)] = 1
    needed: Count | None = None
    reason: str | None = None
    excluded_loss: Amount | None = None

    def __post_init__(self) -> None:
        low, high = self.interval
        if low > high:
            raise ValueError(f"`interval` is [{low}, {high}]; expected the lower end first")

    @property
    def is_better(self) -> bool | None:
        """Whether the first system is shown to be better (True) or worse (False); else None."""
        if self.shown not in ("higher", "lower"):
            return None
        if self.quantity == "text_loss":
            return self.shown == "lower"
        return self.shown == "higher"

    @property
    def target(self) -> float:
        """The difference that the comparison should be able to show.

        It is the measured difference, or the smallest difference that matters if this is larger.
        """
        return max(abs(self.mean), self._words.relevant)

    @property
    def label(self) -> str:
        """The result in one or two words, for the cell of a table."""
        if self.is_better is True:
            return "better"
        if self.is_better is False:
            return "worse"
        if self.shown == "none shown":
            return "not shown"
        if self.shown == "guessing":
            return "no verdict"
        return self.shown

    def sentence(self, ours: str = "routed", theirs: str = "base") -> str:
        """Return one sentence with all numbers, including those of the exact test."""
        numbers = self._write_numbers(with_test=True)
        return f"{self._words.title} of {ours} minus {theirs}: {self._conclude(numbers)}."

    @property
    def details(self) -> str:
        """The size of the difference, the excluded loss and how sure the difference is."""
        return self._conclude(self._write_numbers(with_test=False))

    def _conclude(self, numbers: str) -> str:
        """Add to the numbers which loss is excluded, and how sure the difference is."""
        parts = [numbers]
        if self.exclusion:
            parts.append(self.exclusion)
        parts.append(self.claim)
        return "; ".join(parts)

    @property
    def size(self) -> str:
        """The size of the difference with its unit and without its sign: "16.7 points"."""
        size = self._words.scale * abs(self.mean)
        if self._words.scale == 1:
            return f"{size:.2g} {self._words.unit}"
        return f"{size:.1f} {self._words.unit}"

    def _write_numbers(self, *, with_test: bool) -> str:
        """Return the difference, its interval, and the number of questions or texts.

        `with_test` adds the numbers of the exact test.
        """
        size = f"{self.write(self.mean)} {self._words.unit}"
        samples = f"{self.n} {self._words.samples}"
        if self.interval[0] == self.interval[1]:
            return f"{size} (the same on all {samples})"
        low, high = map(self.write, self.interval)
        if with_test and self.won is not None:
            samples = f"won {self.won}, lost {self.lost} of {samples}"
        if with_test and self.p is not None:
            samples += f", p = {self.p:.2g}"
        if with_test and self.p_corrected is not None:
            samples += f", {self.p_corrected:.2g} corrected for {self.num_tests} tests"
        return f"{size} (95 % interval {low} to {high}; {samples})"

    @property
    def exclusion(self) -> str:
        """Which loss is excluded, in words; empty if no loss is excluded."""
        if self.excluded_loss is None:
            return ""
        words = self._words
        if self.excluded_loss == 0 and self.is_better:
            return f"every {words.loss} is excluded"
        return f"{words.a_loss} of more than {self.write_excluded()} {words.unit} is excluded"

    @property
    def claim(self) -> str:
        """How sure the difference is, in words."""
        claim = self._write_claim()
        if self.reason is None:
            return claim
        return f"{claim} ({self.reason})"

    def _write_claim(self) -> str:
        """Say how sure the difference is, without the reason."""
        words = self._words
        target = f"{self.write(self.target).lstrip('+')} {words.unit}"
        if self.is_better is not None:
            return f"it is shown to be {self.label}"
        if self.shown == "none shown":
            return "no difference is shown"
        if self.shown == "guessing":
            return "no verdict"
        needed = power.round_up(self.needed or 0)
        return f"inconclusive: about {needed} {words.samples} would show a difference of {target}"

    @property
    def shown_loss(self) -> tuple[float, float] | None:
        """The interval of the loss, both ends positive, if a loss is shown; else None."""
        if self.is_better is not False:
            return None
        low, high = self.interval
        if self.quantity == "text_loss":  # the only quantity whose increase is a loss
            return low, high
        return -high, -low

    @property
    def _words(self) -> QuantityWords:
        return WORDS[self.quantity]

    def write(self, value: float, limit: float | None = None) -> str:
        """Write a difference of this quantity: points of accuracy, or nats.

        Args:
            value: The difference, a share of the questions or nats.
            limit: A limit in the same unit. A bound of −2.97 points passes a limit of 3 points, so
                it must not look like −3.0: it gets as many digits as tell it from the limit.
        """
        words = self._words
        digits = words.digits
        size = words.scale * value
        if limit is not None:
            digits += _count_more_digits(abs(size), words.scale * limit, digits)
        return signed(size, digits)

    def write_excluded(self, limit: float | None = None) -> str:
        """Write the excluded loss in points or nats, without a sign; a dash if it is None.

        Args:
            limit: As for `write`.
        """
        if self.excluded_loss is None:
            return "–"
        return self.write(self.excluded_loss, limit).removeprefix("+")


def _count_more_digits(size: float, limit: float, digits: int) -> int:
    """Return how many more digits tell a size from a limit, at most `MAX_MORE_DIGITS`."""
    for more in range(MAX_MORE_DIGITS):
        if round(size, digits + more) != round(limit, digits + more):
            return more
    return MAX_MORE_DIGITS


class Differences(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The comparison of two systems in each quantity.

    `gold_logprob` and `text_loss` are None if a system lacks the quantity.
    """

    accuracy: Verdict
    gold_logprob: Verdict | None = None
    text_loss: Verdict | None = None

    @property
    def details(self) -> str:
        """The differences of accuracy and next-token loss as part of a sentence."""
        parts = [f"accuracy {self.accuracy.details}"]
        if self.text_loss is not None:
            parts.append(f"next-token loss {self.text_loss.details}")
        return "; ".join(parts)
