"""What a comparison of two systems allows to be said, decided and worded here, once.

One test and one interval per comparison. Right and wrong answers: McNemar's exact test with Tango's
interval; where the two differ, the weaker claim is made and the reason said. Means: the bootstrap
interval alone. A difference of accuracy or of the gold answers' log-probability is claimed only
where base is above chance.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple, TypeAlias

import msgspec
from msgspec.structs import replace

from drllm.statistics import power
from drllm.statistics.intervals import is_single, mean_interval
from drllm.statistics.paired import Outcomes, holm, mcnemar_exact, paired_interval, won_lost

Quantity: TypeAlias = Literal["accuracy", "gold_logprob", "text_loss", "label_accuracy"]
Shown: TypeAlias = Literal["higher", "lower", "none shown", "too few", "guessing"]

ROUNDING = 1e-4
"""Differences up to here, in points or nats, are those of arithmetic in another order."""


def signed(value: float, digits: int) -> str:
    """Write a change with its sign and a true minus; what rounds to zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if text.strip("+-0.") else text[1:]


class _Words(NamedTuple):
    """How a quantity is written; `worth` is a difference that a comparison must be able to show."""

    title: str
    unit: str
    scale: float
    digits: int
    things: str
    worth: float


_WORDS: dict[Quantity, _Words] = {
    "accuracy": _Words("Accuracy", "points", 100, 1, "questions", worth=0.05),
    "gold_logprob": _Words(
        "Log-probability of the gold answers", "nats a question", 1, 3, "questions", worth=0.1
    ),
    "text_loss": _Words("Next-token loss", "nats a token", 1, 3, "texts", worth=0.05),
    "label_accuracy": _Words("Accuracy", "points", 100, 1, "held-out targets", worth=0.05),
}


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a comparison of one system with another shows; `docs/formats.md` has the fields.

    `shown` is `none shown` where a difference worth having would probably have been shown, `too
    few` where it wouldn't (`needed` questions would show `target` with a probability of 80 %), and
    `guessing` where nothing can be claimed since base isn't above chance. `won`, `lost` and `p` are
    None for means; where there is a `p_corrected`, it decides. Of `text_loss` more is worse.
    """

    quantity: Quantity
    mean: float
    interval: tuple[float, float]
    n: int
    shown: Shown
    won: int | None = None
    lost: int | None = None
    p: float | None = None
    p_corrected: float | None = None
    num_tests: int = 1
    needed: int | None = None
    reason: str | None = None

    @property
    def is_better(self) -> bool | None:
        """Whether the first system is shown to be better (True), worse (False), or neither."""
        if self.shown not in ("higher", "lower"):
            return None
        return (self.shown == "higher") == (self.quantity != "text_loss")

    @property
    def target(self) -> float:
        """The difference that must be detectable: the one seen, or one worth having."""
        return max(abs(self.mean), self._words.worth)

    @property
    def label(self) -> str:
        """What is shown in one or two words, for the cell of a table."""
        if self.is_better is not None:
            return "better" if self.is_better else "worse"
        return {"none shown": "not shown", "guessing": "no verdict"}.get(self.shown, self.shown)

    def sentence(self, ours: str = "routed", theirs: str = "base") -> str:
        """Return the size of the difference between two named systems, then what is shown.

        Where it is too small to be told, that comes first.
        """
        compared = f"{self._words.title} of {ours} minus {theirs}"
        if self.shown == "too few":
            return f"{_upper(self.claim)}: {lower(compared)} {self.numbers}."
        return f"{compared}: {self.numbers}: {self.claim}."

    @property
    def numbers(self) -> str:
        """The size of the difference with its interval and what it was seen on."""
        size = f"{self.write(self.mean)} {self._words.unit}"
        things = f"{self.n} {self._words.things}"
        if self.interval[0] == self.interval[1]:
            return f"{size} (the same on all {things})"
        low, high = map(self.write, self.interval)
        counts = "" if self.won is None else f"won {self.won}, lost {self.lost} of "
        tested = "" if self.p is None else f", p = {self.p:.2g}"
        if self.p_corrected is not None:
            tested += f", {self.p_corrected:.2g} corrected for {self.num_tests} tests"
        return f"{size} (95 % interval {low} to {high}; {counts}{things}{tested})"

    @property
    def claim(self) -> str:
        """What is shown, in words."""
        target = f"{self.write(self.target).lstrip('+')} {self._words.unit}"
        if self.is_better is not None:
            return f"{self.shown}, which is {self.label}"
        if self.shown == "none shown":
            said, also = "no difference is shown", f"{target} would hardly have been missed"
        elif self.shown == "guessing":
            said, also = "no verdict", ""
        else:
            said = f"too few {self._words.things} to tell"
            needed = power.rounded_up(self.needed or 0)
            also = f"about {needed} would show a difference of {target}"
        reasons = "; ".join(filter(None, (also, self.reason)))
        return f"{said} ({reasons})" if reasons else said

    @property
    def _words(self) -> _Words:
        return _WORDS[self.quantity]

    def write(self, value: float) -> str:
        """Write a difference of this quantity: points of accuracy, or nats."""
        return signed(self._words.scale * value, self._words.digits)


class Differences(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two systems compared in all that is known of both; None where either side doesn't know it."""

    accuracy: Verdict
    gold_logprob: Verdict | None = None
    text_loss: Verdict | None = None

    def headline(self, cost: str) -> str:
        """Say in one line what is shown of accuracy and next-token loss, at what cost."""
        said, claim = f"accuracy {self.accuracy.numbers}", self.accuracy.claim
        both = [claim, said] if self.accuracy.shown == "too few" else [said, claim]
        return f"{_upper('; '.join([': '.join(both), *self._on_loss(), cost]))}."

    def told(self, cost: str = "") -> str:
        """Say the size of each difference, and at what cost, before what is shown of it."""
        accuracy = f"accuracy {self.accuracy.numbers}{cost}: {self.accuracy.claim}"
        return "; ".join([accuracy, *self._on_loss()])

    def _on_loss(self) -> list[str]:
        loss = self.text_loss
        return [] if loss is None else [f"next-token loss {loss.numbers}: {loss.claim}"]


def compare(
    ours: Outcomes, theirs: Outcomes, seed: int, *, above_chance: bool = True
) -> Differences:
    """Compare two systems on the same questions and texts; a gain is a gain of ours.

    Where base isn't shown to be above chance, the next-token loss is judged nevertheless: nobody
    guesses it. Another number of questions or texts is a ValueError.
    """

    def means(quantity: Quantity, one: Sequence[float], other: Sequence[float]) -> Verdict:
        judged = above_chance or quantity == "text_loss"
        return judge_means(quantity, one, other, seed, above_chance=judged)

    if is_single(ours.correct) and is_single(theirs.correct):
        won, lost = won_lost(ours.correct, theirs.correct)
        accuracy = judge_counts(won, lost, len(ours.correct), above_chance=above_chance)
    else:
        accuracy = means("accuracy", ours.correct, theirs.correct)
    gold, loss = (ours.gold_logprob, theirs.gold_logprob), (ours.text_loss, theirs.text_loss)
    return Differences(
        accuracy=accuracy,
        gold_logprob=means("gold_logprob", *gold) if all(gold) else None,
        text_loss=means("text_loss", *loss) if all(loss) else None,
    )


def judge_counts(
    won: float,
    lost: float,
    n: int,
    *,
    above_chance: bool = True,
    p_corrected: float | None = None,
    num_tests: int = 1,
) -> Verdict:
    """Judge two accuracies by the questions won and lost of n, with the arguments of `Verdict`.

    Won and lost may be fractions, where a question can be won in part: difference and interval are
    of the fractions, and only the exact test, which needs whole questions, is of rounded ones.

    Source: ours, of McNemar's exact test and Tango's interval.
    """
    interval = paired_interval(won, lost, n)
    p = mcnemar_exact(round(won), round(lost))
    by_test = (p if p_corrected is None else p_corrected) < power.ALPHA
    by_interval = not interval[0] <= 0 <= interval[1]
    reason = None
    if by_interval and not by_test:
        after = "" if p_corrected is None else ", corrected for several tests,"
        reason = f"the interval excludes 0, but the exact test{after} doesn't show a difference"
    elif by_test and not by_interval:
        reason = "the exact test shows a difference, but the interval includes 0"
    verdict = Verdict(
        quantity="accuracy",
        mean=(won - lost) / n,
        interval=interval,
        n=n,
        shown="none shown",
        won=round(won),
        lost=round(lost),
        p=p,
        p_corrected=p_corrected,
        num_tests=num_tests,
        reason=reason,
    )
    if not above_chance:
        return _guessing(verdict)
    if by_test and by_interval:
        return replace(verdict, shown="higher" if won > lost else "lower")
    # Of several tests the strictest of Holm's levels, so that no more is promised than holds.
    alpha, discordant, target = power.ALPHA / num_tests, (won + lost) / n, verdict.target
    chance = power.chance_to_show(n, max(discordant, target), target, alpha)
    if chance >= power.POWER or _within(interval, target):
        return verdict
    needed = power.questions_needed(n, discordant, target, alpha=alpha)
    return replace(verdict, shown="too few", needed=needed)


def judge_means(
    quantity: Quantity,
    ours: Sequence[float],
    theirs: Sequence[float],
    seed: int,
    *,
    above_chance: bool = True,
) -> Verdict:
    """Judge two means over the same questions or texts by the bootstrap interval."""
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    n, mean, (low, high) = len(values), fmean(values), mean_interval(values, seed)
    verdict = Verdict(quantity=quantity, mean=mean, interval=(low, high), n=n, shown="none shown")
    if not above_chance:
        return _guessing(verdict)
    tolerance = ROUNDING / _WORDS[quantity].scale
    differing = sum(abs(value) > tolerance for value in values)
    if low > 0 or high < 0:
        if differing >= power.FEWEST_DIFFERENT:
            return replace(verdict, shown="higher" if low > 0 else "lower")
        verdict = replace(verdict, reason=f"the interval excludes 0, but only {differing} differ")
    least = power.detectable_mean(values)
    times = 1.0 if least is None else (least / verdict.target) ** 2
    if n >= power.FEWEST_DIFFERENT and (times <= 1 or _within((low, high), verdict.target)):
        return verdict
    needed = max(power.FEWEST_DIFFERENT, math.ceil(n * times))
    return replace(verdict, shown="too few", needed=needed)


def correct_together(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Judge each task's comparison again, the tests corrected for each other by Holm's method."""
    tested = [each.p for each in verdicts if each.p is not None]
    if len(tested) < 2:
        return list(verdicts)
    adjusted = iter(holm(tested))
    return [
        each
        if each.won is None or each.lost is None
        else judge_counts(
            each.won,
            each.lost,
            each.n,
            above_chance=each.shown != "guessing",
            p_corrected=next(adjusted),
            num_tests=len(tested),
        )
        for each in verdicts
    ]


def judge_times(ratios: Sequence[Sequence[float]]) -> list[str]:
    """Say of each list of rounds what the ratios of two times in a round show of the first.

    By the sign test, corrected by Holm's method for their being several.
    """
    sides = [(sum(each < 1 for each in one), sum(each > 1 for each in one)) for one in ratios]
    shown = [p < power.ALPHA for p in holm([mcnemar_exact(*each) for each in sides])]
    return [
        ("faster" if less > more else "slower") if is_shown else "too noisy to tell"
        for (less, more), is_shown in zip(sides, shown, strict=True)
    ]


def _guessing(verdict: Verdict) -> Verdict:
    return replace(verdict, shown="guessing", reason="base is not shown to be above chance")


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def lower(text: str) -> str:
    """Return a sentence as it stands within another."""
    return text[0].lower() + text[1:]


def _within(interval: tuple[float, float], limit: float) -> bool:
    return -limit < interval[0] and interval[1] < limit
