"""Decides what a comparison of two systems shows, and says it in words.

Right and wrong answers are compared by McNemar's exact test and Tango's interval. If the test and
the interval disagree, the weaker claim is made and the reason is given. Means are compared by their
bootstrap interval. A difference of accuracy or of the gold answers' log-probability is claimed only
if base is above chance.

Every comparison also says which loss it excludes: "a loss of more than 1.9 points is excluded".
This number is the end of the two-sided 95 % interval.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple, TypeAlias

import msgspec
from msgspec.structs import replace

from drllm.statistics import power
from drllm.statistics.intervals import is_right_or_wrong, mean_interval, upper_bound
from drllm.statistics.paired import Outcomes, count_won_lost, holm, mcnemar_exact, paired_interval

Quantity: TypeAlias = Literal["accuracy", "gold_logprob", "text_loss", "label_accuracy"]
Shown: TypeAlias = Literal["higher", "lower", "none shown", "too few", "guessing"]

ROUNDING = 1e-4
"""Smaller differences, in points or nats, are rounding errors."""
FEWEST_TEXTS = 30
"""With fewer texts no increase of their loss is excluded, because the true increase is above the
bound too often if some texts lose far more than the others. If one text in ten does, this happens
in 17 % of the cases with 20 texts and in 8 % with 30. It should happen in 5 %."""
EXCLUDING = 0.975
"""The one-sided confidence of each end of a two-sided 95 % interval."""


def signed(value: float, digits: int) -> str:
    """Write a change with its sign (the minus is U+2212); a change that rounds to 0 has no sign."""
    text = f"{value:+.{digits}f}"
    if not text.strip("+-0."):
        return text[1:]
    return text.replace("-", "−")


class _Words(NamedTuple):
    """How a quantity is written.

    `things` are the things that the quantity is measured on. `loss` is the word for a change for
    the worse. `relevant` is a difference that a comparison must be able to show.
    """

    title: str
    unit: str
    scale: float
    digits: int
    things: str
    loss: str
    relevant: float


_WORDS: dict[Quantity, _Words] = {
    "accuracy": _Words("Accuracy", "points", 100, 1, "questions", "a loss", relevant=0.05),
    "gold_logprob": _Words(
        "Log-probability of the gold answers",
        "nats a question",
        1,
        3,
        "questions",
        "a loss",
        relevant=0.1,
    ),
    "text_loss": _Words(
        "Next-token loss", "nats a token", 1, 3, "texts", "an increase", relevant=0.05
    ),
    "label_accuracy": _Words(
        "Accuracy", "points", 100, 1, "held-out targets", "a loss", relevant=0.05
    ),
}


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a comparison of two systems shows; `docs/formats.md` describes the fields.

    If no difference is shown, `shown` says why. With `none shown`, a difference worth having would
    probably have been shown. With `too few`, it wouldn't, and `needed` questions would show
    `target` with a probability of 80 %. With `guessing`, base isn't above chance, so nothing can be
    claimed.

    `won`, `lost` and `p` are None for means. `p_corrected` decides instead of `p`, unless it is
    None. A higher `text_loss` is worse. Every loss larger than `excluded_loss` is excluded (for
    `text_loss`, every larger increase). `excluded_loss` is None if no loss is excluded, and in
    files of earlier versions.
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
    excluded_loss: float | None = None

    @property
    def is_better(self) -> bool | None:
        """Whether the first system is shown to be better (True), worse (False), or neither."""
        if self.shown not in ("higher", "lower"):
            return None
        return (self.shown == "higher") == (self.quantity != "text_loss")

    @property
    def target(self) -> float:
        """The difference that must be detectable: the measured one, or one worth having."""
        return max(abs(self.mean), self._words.relevant)

    @property
    def label(self) -> str:
        """The result in one or two words, for the cell of a table."""
        if self.is_better is not None:
            return "better" if self.is_better else "worse"
        if self.shown == "none shown":
            return "not shown"
        if self.shown == "guessing":
            return "no verdict"
        return self.shown

    def sentence(self, ours: str = "routed", theirs: str = "base") -> str:
        """Return one sentence with all numbers, including those of the exact test."""
        numbers = self._numbers(with_test=True)
        return f"{self._words.title} of {ours} minus {theirs}: {self._conclude(numbers)}."

    def statement(self) -> str:
        """Return a shorter sentence, for places where it is clear which systems are compared.

        The sentence has the size of the difference, the excluded loss and how sure the difference
        is. It doesn't have the exact test's numbers.
        """
        return f"{self._words.title} changes by {self.details}."

    @property
    def details(self) -> str:
        """The size of the difference, the excluded loss and how sure the difference is."""
        return self._conclude(self._numbers(with_test=False))

    def _conclude(self, numbers: str) -> str:
        """Add to the numbers which loss is excluded, and how sure the difference is."""
        parts = [numbers]
        if self.exclusion:
            parts.append(self.exclusion)
        parts.append(self.claim)
        return "; ".join(parts)

    def _numbers(self, *, with_test: bool) -> str:
        """Return the size of the difference, its interval, and the number of questions or texts."""
        size = f"{self.write(self.mean)} {self._words.unit}"
        sample = f"{self.n} {self._words.things}"
        if self.interval[0] == self.interval[1]:
            return f"{size} (the same on all {sample})"
        low, high = map(self.write, self.interval)
        if with_test and self.won is not None:
            sample = f"won {self.won}, lost {self.lost} of {sample}"
        if with_test and self.p is not None:
            sample += f", p = {self.p:.2g}"
        if with_test and self.p_corrected is not None:
            sample += f", {self.p_corrected:.2g} corrected for {self.num_tests} tests"
        return f"{size} (95 % interval {low} to {high}; {sample})"

    @property
    def exclusion(self) -> str:
        """Which loss is excluded, in words; empty if no loss is excluded."""
        if self.excluded_loss is None:
            return ""
        loss = self._words.loss
        if self.excluded_loss == 0 and self.is_better:
            return f"every {loss.split()[-1]} is excluded"
        return f"{loss} of more than {self.write_excluded()} {self._words.unit} is excluded"

    @property
    def claim(self) -> str:
        """How sure the difference is, in words."""
        claim = self._claim_alone()
        if self.reason is None:
            return claim
        return f"{claim} ({self.reason})"

    def _claim_alone(self) -> str:
        """Say how sure the difference is, without the reason."""
        target = f"{self.write(self.target).lstrip('+')} {self._words.unit}"
        if self.is_better is not None:
            return f"it is shown to be {self.label}"
        if self.shown == "none shown":
            return f"no difference is shown, and one of {target} would probably have been"
        if self.shown == "guessing":
            return "no verdict"
        needed = power.round_up(self.needed or 0)
        return (
            f"inconclusive: about {needed} {self._words.things} would show a difference of {target}"
        )

    @property
    def _words(self) -> _Words:
        return _WORDS[self.quantity]

    def write(self, value: float) -> str:
        """Write a difference of this quantity: points of accuracy, or nats."""
        return signed(self._words.scale * value, self._words.digits)

    def write_excluded(self) -> str:
        """Write the excluded loss in points or nats, without a sign; a dash if it is None."""
        if self.excluded_loss is None:
            return "–"
        return self.write(self.excluded_loss).removeprefix("+")


class Differences(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The comparison of two systems in each quantity; None if one system lacks the quantity."""

    accuracy: Verdict
    gold_logprob: Verdict | None = None
    text_loss: Verdict | None = None

    def headline(self, name: str, *, saves_layers: bool, cost: str) -> str:
        """Return at most three sentences: what to do, then accuracy, then next-token loss.

        Args:
            name: The first system's name.
            saves_layers: Whether the first system runs fewer layers than the second.
            cost: How many layers the first system saves, in words.
        """
        sentences = [f"{self.advice(name, saves_layers=saves_layers)} ({cost})."]
        sentences.append(self.accuracy.statement())
        if self.text_loss is not None:
            sentences.append(self.text_loss.statement())
        return " ".join(sentences)

    @property
    def details(self) -> str:
        """The differences of accuracy and next-token loss as part of a sentence."""
        parts = [f"accuracy {self.accuracy.details}"]
        if self.text_loss is not None:
            parts.append(f"next-token loss {self.text_loss.details}")
        return "; ".join(parts)

    def advice(self, name: str, *, saves_layers: bool) -> str:
        """Say what to do with the first system; the arguments are as for `headline`."""
        if self.accuracy.shown == "guessing":
            return (
                f"Take a task that base can do: here base may be guessing, so {name} isn't judged"
            )
        is_accuracy_worse = self.accuracy.is_better is False
        is_text_worse = self.text_loss is not None and self.text_loss.is_better is False
        if is_accuracy_worse and is_text_worse:
            return f"Don't use {name}: its answers and its text are worse"
        if is_accuracy_worse:
            return f"Don't use {name}: its answers are worse"
        if is_text_worse:
            return f"Don't use {name} to write text: its next-token loss is worse"
        if self.accuracy.is_better:
            return f"Use {name}: its answers are better"
        if not saves_layers:
            return (
                f"{capitalize(name)} isn't worth it: it is not shown to be better and saves nothing"
            )
        if self.accuracy.excluded_loss is None:
            return f"{capitalize(name)} saves layers, and no loss is shown"
        loss = f"{self.accuracy.write_excluded()} points"
        if self.accuracy.shown == "too few":
            return f"Use {name} only where a loss of {loss} is acceptable, or ask more questions"
        return f"Use {name} where a loss of {loss} is acceptable: no loss is shown"


def compare(
    ours: Outcomes, theirs: Outcomes, seed: int, *, above_chance: bool = True
) -> Differences:
    """Compare two systems on the same questions and texts; differences are ours minus theirs.

    The next-token loss is judged even if base isn't shown to be above chance, since it can't be
    guessed.

    Raises:
        ValueError: The systems have different numbers of questions or texts.
    """
    gold_logprob = None
    if ours.gold_logprob and theirs.gold_logprob:
        gold_logprob = judge_means(
            "gold_logprob", ours.gold_logprob, theirs.gold_logprob, seed, above_chance=above_chance
        )
    text_loss = None
    if ours.text_loss and theirs.text_loss:
        text_loss = judge_means("text_loss", ours.text_loss, theirs.text_loss, seed)
    return Differences(
        accuracy=_compare_accuracy(ours.correct, theirs.correct, seed, above_chance=above_chance),
        gold_logprob=gold_logprob,
        text_loss=text_loss,
    )


def _compare_accuracy(
    ours: Sequence[float], theirs: Sequence[float], seed: int, *, above_chance: bool
) -> Verdict:
    """Compare accuracies by counts if every answer is right or wrong, else by means."""
    if not (is_right_or_wrong(ours) and is_right_or_wrong(theirs)):
        return judge_means("accuracy", ours, theirs, seed, above_chance=above_chance)
    won, lost = count_won_lost(ours, theirs)
    return judge_counts(won, lost, len(ours), above_chance=above_chance)


def judge_counts(
    won: float,
    lost: float,
    n: int,
    *,
    above_chance: bool = True,
    p_corrected: float | None = None,
    num_tests: int = 1,
) -> Verdict:
    """Judge two accuracies by the questions won and lost of n.

    Args:
        won: How many questions only the first system answers right. The number may be a fraction if
            a question can be won in part; only the exact test rounds it.
        lost: How many questions only the second system answers right.
        n: The number of all questions.
        above_chance: Whether base is shown to be above chance; if not, nothing is claimed.
        p_corrected: The exact test's p-value, corrected for several tests; if given, it decides.
        num_tests: How many tests `p_corrected` is corrected for.

    Source: ours, from McNemar's exact test and Tango's interval.
    """
    interval = paired_interval(won, lost, n)
    p = mcnemar_exact(round(won), round(lost))
    decisive_p = p if p_corrected is None else p_corrected
    is_shown_by_test = decisive_p < power.ALPHA
    is_shown_by_interval = not interval[0] <= 0 <= interval[1]
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
        reason=_disagreement(is_shown_by_test, is_shown_by_interval, p_corrected),
        excluded_loss=max(0.0, -interval[0]),
    )
    if not above_chance:
        return _without_claim(verdict)
    if is_shown_by_test and is_shown_by_interval:
        return replace(verdict, shown="higher" if won > lost else "lower")
    # The strictest of Holm's levels, so that the power isn't overstated.
    alpha = power.ALPHA / num_tests
    discordant = (won + lost) / n
    target = verdict.target
    chance = power.chance_to_show(n, max(discordant, target), target, alpha)
    if chance >= power.POWER or _is_within(interval, target):
        return verdict
    needed = power.questions_needed(n, discordant, target, alpha=alpha)
    return replace(verdict, shown="too few", needed=needed)


def _disagreement(by_test: bool, by_interval: bool, p_corrected: float | None) -> str | None:
    """Say how the test and the interval disagree; None if they agree."""
    if by_test == by_interval:
        return None
    if by_test:
        return "the exact test shows a difference, but the interval includes 0"
    if p_corrected is None:
        return "the interval excludes 0, but the exact test doesn't show a difference"
    return (
        "the interval excludes 0, but the exact test, corrected for several tests, doesn't show a "
        "difference"
    )


def judge_means(
    quantity: Quantity,
    ours: Sequence[float],
    theirs: Sequence[float],
    seed: int,
    *,
    above_chance: bool = True,
) -> Verdict:
    """Judge two means over the same questions or texts by the bootstrap interval.

    Args:
        quantity: What the values are.
        ours: The first system's values, one for each question or text.
        theirs: The second system's values.
        seed: Seed of the resampling.
        above_chance: Whether base is shown to be above chance; if not, nothing is claimed.
    """
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    n = len(values)
    low, high = mean_interval(values, seed)
    verdict = Verdict(
        quantity=quantity, mean=fmean(values), interval=(low, high), n=n, shown="none shown"
    )
    if not above_chance:
        return _without_claim(verdict)
    excluded_loss: float | None = max(0.0, -low)
    if quantity == "text_loss":
        excluded_loss = _excluded_increase(values, high, seed)
    verdict = replace(verdict, excluded_loss=excluded_loss)
    tolerance = ROUNDING / _WORDS[quantity].scale
    num_different = sum(abs(value) > tolerance for value in values)
    if low > 0 or high < 0:
        if num_different >= power.FEWEST_DIFFERENT:
            return replace(verdict, shown="higher" if low > 0 else "lower")
        reason = f"the interval excludes 0, but only {num_different} differ"
        verdict = replace(verdict, reason=reason)
    detectable = power.detectable_mean(values)
    factor = 1.0
    if detectable is not None:
        factor = (detectable / verdict.target) ** 2
    is_target_excluded = _is_within((low, high), verdict.target)
    if n >= power.FEWEST_DIFFERENT and (factor <= 1 or is_target_excluded):
        return verdict
    needed = max(power.FEWEST_DIFFERENT, math.ceil(n * factor))
    return replace(verdict, shown="too few", needed=needed)


def _excluded_increase(increases: Sequence[float], high: float, seed: int) -> float | None:
    """Return the next-token loss above which every increase is excluded; None if none is excluded.

    The result is the end of the interval, or the studentised bound if this is higher. The interval
    alone would exclude too much if some texts lose far more than the others.
    """
    if len(increases) < FEWEST_TEXTS:
        return None
    bound = upper_bound(increases, seed, confidence=EXCLUDING)
    if math.isinf(bound):
        return None
    return max(0.0, high, bound)


def correct_together(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Judge comparisons again, after correcting their exact tests by Holm's method.

    Comparisons without an exact test stay as they are.
    """
    pvalues = [verdict.p for verdict in verdicts if verdict.p is not None]
    if len(pvalues) < 2:
        return list(verdicts)
    adjusted = iter(holm(pvalues))
    corrected = []
    for verdict in verdicts:
        if verdict.won is not None and verdict.lost is not None:
            verdict = judge_counts(
                verdict.won,
                verdict.lost,
                verdict.n,
                above_chance=verdict.shown != "guessing",
                p_corrected=next(adjusted),
                num_tests=len(pvalues),
            )
        corrected.append(verdict)
    return corrected


def judge_times(ratios: Sequence[Sequence[float]]) -> list[str]:
    """Say for each comparison whether the first of two systems is faster.

    Args:
        ratios: For each comparison, the first system's time divided by the second's in each round.

    Source: the sign test, corrected by Holm's method for the number of comparisons.
    """
    counts = []  # for each comparison, the rounds in which the first system is faster, and slower
    for rounds in ratios:
        faster = sum(ratio < 1 for ratio in rounds)
        slower = sum(ratio > 1 for ratio in rounds)
        counts.append((faster, slower))
    adjusted = holm([mcnemar_exact(faster, slower) for faster, slower in counts])
    labels = []
    for (faster, slower), p in zip(counts, adjusted, strict=True):
        if p >= power.ALPHA:
            labels.append("too noisy to tell")
        else:
            labels.append("faster" if faster > slower else "slower")
    return labels


def _without_claim(verdict: Verdict) -> Verdict:
    """Return a verdict that claims nothing, since base isn't shown to be above chance."""
    reason = "base is not shown to be above chance"
    return replace(verdict, shown="guessing", reason=reason, excluded_loss=None)


def capitalize(text: str) -> str:
    """Write the first letter of a text in upper case, as at the start of a sentence."""
    return text[0].upper() + text[1:]


def uncapitalize(text: str) -> str:
    """Write the first letter of a text in lower case, as within a sentence."""
    return text[0].lower() + text[1:]


def _is_within(interval: tuple[float, float], limit: float) -> bool:
    """Tell whether an interval lies between −limit and limit."""
    return -limit < interval[0] and interval[1] < limit
