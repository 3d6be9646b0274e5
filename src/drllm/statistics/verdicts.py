"""Decides what a comparison of two systems shows, and says it in words.

Right and wrong answers are compared by McNemar's exact test and Tango's interval. If the test and
the interval disagree, no difference is claimed and the reason is given. Means are compared by their
bootstrap interval. A difference of accuracy or of the gold answers' log-probability is claimed only
if base is above chance.

Every comparison also says which loss it excludes: "a loss of more than 1.9 points is excluded".
This number is the end of the two-sided 95 % interval. So the true loss is larger in about 2.5 % of
comparisons.
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
"""With fewer texts no increase of their loss is excluded. The true increase should be above the
bound in 2.5 % of comparisons, as `EXCLUSION_CONFIDENCE` says. But if few texts lose far more than
the others, they may all be missing in a small sample.

In a simulation one text in ten lost 1 nat, plus noise with a standard deviation of 0.1. The true
increase was above the bound in 12 % of comparisons with 20 texts, 3 to 5 % with 30, and 1 % with 60
or more. It was harder where that one text in ten lost an exponentially distributed number of nats
with a mean of 1: 15 % with 30 texts, 7 % with 60, 4.5 % with 100 and 3 % with 200."""
EXCLUSION_CONFIDENCE = 0.975
"""The one-sided confidence with which larger losses are excluded. Each end of a two-sided 95 %
interval has this confidence."""


def signed(value: float, digits: int) -> str:
    """Write a change with its sign (the minus is U+2212); a change that rounds to 0 has no sign."""
    text = f"{value:+.{digits}f}"
    is_zero = not text.strip("+-0.")
    if is_zero:
        return text[1:]
    return text.replace("-", "−")


class _Words(NamedTuple):
    """How a quantity is written, and which difference matters.

    Attributes:
        title: The quantity's name at the start of a sentence.
        unit: The unit of a difference.
        scale: The factor from a value to this unit.
        digits: Digits after the decimal point.
        samples: The word for the samples that the quantity is measured on.
        loss: The word for a change for the worse.
        a_loss: The same word with its article.
        relevant: A difference worth having, unscaled. A comparison should be able to show it.
    """

    title: str
    unit: str
    scale: float
    digits: int
    samples: str
    loss: str
    a_loss: str
    relevant: float


_ACCURACY = _Words(
    title="Accuracy",
    unit="points",
    scale=100,
    digits=1,
    samples="questions",
    loss="loss",
    a_loss="a loss",
    relevant=0.05,
)
_WORDS: dict[Quantity, _Words] = {
    "accuracy": _ACCURACY,
    "label_accuracy": _ACCURACY._replace(samples="held-out targets"),
    "gold_logprob": _Words(
        title="Log-probability of the gold answers",
        unit="nats a question",
        scale=1,
        digits=3,
        samples="questions",
        loss="loss",
        a_loss="a loss",
        relevant=0.1,
    ),
    "text_loss": _Words(
        title="Next-token loss",
        unit="nats a token",
        scale=1,
        digits=3,
        samples="texts",
        loss="increase",
        a_loss="an increase",
        relevant=0.05,
    ),
}


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
        """Whether the first system is shown to be better (True) or worse (False); else None."""
        if self.shown not in ("higher", "lower"):
            return None
        if self.quantity == "text_loss":
            return self.shown == "lower"
        return self.shown == "higher"

    @property
    def target(self) -> float:
        """The difference that the comparison should be able to show.

        It is the measured difference, or a difference worth having if this is larger.
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

    def statement(self) -> str:
        """Return a shorter sentence, for places where it is clear which systems are compared.

        It doesn't have the exact test's numbers.
        """
        return f"{self._words.title} changes by {self.details}."

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

    def _write_numbers(self, *, with_test: bool) -> str:
        """Return the size of the difference, its interval, and the number of questions or texts.

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
            return f"no difference is shown, and one of {target} would probably have been"
        if self.shown == "guessing":
            return "no verdict"
        needed = power.round_up(self.needed or 0)
        return f"inconclusive: about {needed} {words.samples} would show a difference of {target}"

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
    """The comparison of two systems in each quantity.

    `gold_logprob` and `text_loss` are None if a system lacks the quantity.
    """

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

    Args:
        ours: The outcomes of the first system.
        theirs: The outcomes of the second system.
        seed: Seed of the resampling.
        above_chance: Whether base is shown to be above chance. If it isn't, only the next-token
            loss is judged, which can't be low by guessing.

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
    """Compare accuracies: by counts if every answer is right or wrong, otherwise by means."""
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
        p_corrected: The exact test's p-value, corrected for several tests, which decides instead of
            the plain p-value. None if it isn't corrected.
        num_tests: How many tests `p_corrected` is corrected for.

    Source: ours, from McNemar's exact test and Tango's interval.
    """
    interval = paired_interval(won, lost, n)
    p = mcnemar_exact(round(won), round(lost))
    decisive_p = p
    if p_corrected is not None:
        decisive_p = p_corrected
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
        reason=_describe_disagreement(is_shown_by_test, is_shown_by_interval, p_corrected),
        excluded_loss=max(0.0, -interval[0]),
    )
    if not above_chance:
        return _remove_claim(verdict)
    if is_shown_by_test and is_shown_by_interval:
        return _show_difference(verdict, is_higher=won > lost)
    needed = _estimate_needed_questions(verdict, (won + lost) / n)
    if needed is None:
        return verdict
    return replace(verdict, shown="too few", needed=needed)


def _describe_disagreement(
    is_shown_by_test: bool, is_shown_by_interval: bool, p_corrected: float | None
) -> str | None:
    """Say how the test and the interval disagree; return None if they agree."""
    if is_shown_by_test == is_shown_by_interval:
        return None
    if is_shown_by_test:
        return "the exact test shows a difference, but the interval includes 0"
    if p_corrected is None:
        return "the interval excludes 0, but the exact test doesn't show a difference"
    return (
        "the interval excludes 0, but the exact test, corrected for several tests, doesn't show a "
        "difference"
    )


def _estimate_needed_questions(verdict: Verdict, discordant: float) -> int | None:
    """Estimate how many questions would probably show the target.

    Return None if the questions of the verdict are enough. `discordant` is the share of questions
    that one system answers right and the other wrong.
    """
    alpha = power.ALPHA / verdict.num_tests  # the strictest of Holm's levels
    target = verdict.target
    chance = power.chance_to_show(verdict.n, max(discordant, target), target, alpha)
    if chance >= power.POWER or _is_within(verdict.interval, target):
        return None
    return power.questions_needed(verdict.n, discordant, target, alpha=alpha)


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
    pairs = zip(ours, theirs, strict=True)
    differences = [our_value - their_value for our_value, their_value in pairs]
    low, high = mean_interval(differences, seed)
    verdict = Verdict(
        quantity=quantity,
        mean=fmean(differences),
        interval=(low, high),
        n=len(differences),
        shown="none shown",
    )
    if not above_chance:
        return _remove_claim(verdict)
    excluded_loss: float | None = max(0.0, -low)
    if quantity == "text_loss":
        excluded_loss = _find_excluded_increase(differences, high, seed)
    verdict = replace(verdict, excluded_loss=excluded_loss)
    if low > 0 or high < 0:
        tolerance = ROUNDING / _WORDS[quantity].scale
        num_different = sum(abs(difference) > tolerance for difference in differences)
        if num_different >= power.FEWEST_DIFFERENT:
            return _show_difference(verdict, is_higher=low > 0)
        reason = f"the interval excludes 0, but only {num_different} differ"
        verdict = replace(verdict, reason=reason)
    needed = _estimate_needed_values(verdict, differences)
    if needed is None:
        return verdict
    return replace(verdict, shown="too few", needed=needed)


def _estimate_needed_values(verdict: Verdict, differences: Sequence[float]) -> int | None:
    """Estimate how many questions or texts would probably show the target.

    Return None if the questions or texts of the verdict are enough.
    """
    factor = 1.0
    detectable = power.detectable_mean(differences)
    if detectable is not None:
        # The detectable difference falls with the square root of the number.
        factor = (detectable / verdict.target) ** 2
    is_enough = factor <= 1 or _is_within(verdict.interval, verdict.target)
    if is_enough and verdict.n >= power.FEWEST_DIFFERENT:
        return None
    return max(power.FEWEST_DIFFERENT, math.ceil(verdict.n * factor))


def _find_excluded_increase(increases: Sequence[float], high: float, seed: int) -> float | None:
    """Return the increase of the next-token loss above which every increase is excluded.

    The result is `high`, the upper end of the interval, or the studentised bound if this is higher.
    The interval alone would exclude too much if some texts lose far more than the others. The
    result is None if the texts are too few to exclude any increase.
    """
    if len(increases) < FEWEST_TEXTS:
        return None
    bound = upper_bound(increases, seed, confidence=EXCLUSION_CONFIDENCE)
    if math.isinf(bound):
        return None
    return max(0.0, high, bound)


def correct_together(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Judge comparisons again, after correcting their exact tests by Holm's method.

    Comparisons without an exact test stay as they are. If only one comparison has an exact test,
    nothing is corrected.
    """
    pvalues = [verdict.p for verdict in verdicts if verdict.p is not None]
    if len(pvalues) < 2:
        return list(verdicts)
    corrected_pvalues = iter(holm(pvalues))
    corrected = []
    for verdict in verdicts:
        if verdict.won is None or verdict.lost is None:  # has no exact test
            corrected.append(verdict)
            continue
        corrected_verdict = judge_counts(
            verdict.won,
            verdict.lost,
            verdict.n,
            above_chance=verdict.shown != "guessing",
            p_corrected=next(corrected_pvalues),
            num_tests=len(pvalues),
        )
        corrected.append(corrected_verdict)
    return corrected


def judge_times(ratios: Sequence[Sequence[float]]) -> list[str]:
    """Say for each comparison whether the first of two systems is faster or slower.

    Args:
        ratios: For each comparison and round, the first system's time divided by the second's.

    Source: the sign test, corrected by Holm's method for the number of comparisons.
    """
    counts = []  # for each comparison, the rounds in which the first system is faster, and slower
    for rounds in ratios:
        faster = sum(ratio < 1 for ratio in rounds)
        slower = sum(ratio > 1 for ratio in rounds)
        counts.append((faster, slower))
    pvalues = holm([mcnemar_exact(faster, slower) for faster, slower in counts])
    labels = []
    for (faster, slower), p in zip(counts, pvalues, strict=True):
        if p >= power.ALPHA:
            labels.append("too noisy to tell")
        elif faster > slower:
            labels.append("faster")
        else:
            labels.append("slower")
    return labels


def _remove_claim(verdict: Verdict) -> Verdict:
    """Return the verdict without any claim, since base isn't shown to be above chance."""
    reason = "base is not shown to be above chance"
    return replace(verdict, shown="guessing", reason=reason, excluded_loss=None)


def _show_difference(verdict: Verdict, *, is_higher: bool) -> Verdict:
    """Return the verdict with the claim that its difference is shown."""
    if is_higher:
        return replace(verdict, shown="higher")
    return replace(verdict, shown="lower")


def capitalize(text: str) -> str:
    """Write the first letter of a text in upper case, as at the start of a sentence."""
    return text[0].upper() + text[1:]


def uncapitalize(text: str) -> str:
    """Write the first letter of a text in lower case, as within a sentence."""
    return text[0].lower() + text[1:]


def _is_within(interval: tuple[float, float], limit: float) -> bool:
    """Tell whether an interval lies between −limit and limit."""
    return -limit < interval[0] and interval[1] < limit
