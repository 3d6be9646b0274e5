"""Decides what a comparison of two systems shows; `differences` says it in words.

Right and wrong answers are compared by McNemar's exact test and Tango's interval. If the test and
the interval disagree, no difference is claimed and the reason is given. Means are compared by their
bootstrap interval. A difference of accuracy or of the gold answers' log-probability is claimed only
if base is above chance.

Every comparison also says which loss it excludes: "a loss of more than 1.9 points is excluded".
This number is the end of the two-sided 95 % interval. So the true loss is larger in about 2.5 % of
comparisons. Where a path is the best of several on the same questions, its headline divides this
level by their number.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from msgspec.structs import replace

from drllm.statistics import power
from drllm.statistics.differences import Differences, Verdict
from drllm.statistics.intervals import is_right_or_wrong, mean_interval, upper_bound
from drllm.statistics.paired import Outcomes, count_won_lost, holm, mcnemar_exact, paired_interval
from drllm.statistics.words import WORDS, Quantity

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
    if quantity == "accuracy" and _are_grades(ours) and _are_grades(theirs):
        excluded_loss: float | None = _find_excluded_drop(differences, low)
    elif quantity == "text_loss":
        excluded_loss = _find_excluded_increase(differences, high, seed)
    else:
        falls = [-difference for difference in differences]
        excluded_loss = _find_excluded_increase(falls, -low, seed)
    verdict = replace(verdict, excluded_loss=excluded_loss)
    if low > 0 or high < 0:
        tolerance = ROUNDING / WORDS[quantity].scale
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


def _are_grades(values: Sequence[float]) -> bool:
    """Tell whether all values lie between 0, wrong, and 1, right."""
    return all(0 <= value <= 1 for value in values)


def _find_excluded_drop(differences: Sequence[float], low: float) -> float:
    """Return the drop of a mean grade above which every drop is excluded.

    The result is the lower end of the bootstrap interval or, if it is further from 0, that of
    Tango's interval, with all gains as questions won and all losses as questions lost. Grades
    differ by 1 at most, so they vary no more than answers that are right or wrong with these sums.
    The bootstrap alone has no width if no grade of a sample differs.
    """
    won = sum(difference for difference in differences if difference > 0)
    lost = -sum(difference for difference in differences if difference < 0)
    paired_low, _ = paired_interval(won, lost, len(differences))
    return max(0.0, -low, -paired_low)


def _find_excluded_increase(increases: Sequence[float], high: float, seed: int) -> float | None:
    """Return the increase of a loss above which every increase is excluded.

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


def apply_holm(verdicts: Sequence[Verdict]) -> list[Verdict]:
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


def apply_bonferroni(verdict: Verdict, num_candidates: int) -> Verdict:
    """Return a verdict on accuracies whose excluded loss holds for the best of several candidates.

    A candidate that was picked by its results on the same questions looks better than it is. So the
    level is divided by the number of candidates (Bonferroni). Other verdicts stay as they are.
    """
    if verdict.won is None or verdict.lost is None or verdict.excluded_loss is None:
        return verdict
    confidence = 1 - power.ALPHA / num_candidates
    low, _ = paired_interval(verdict.won, verdict.lost, verdict.n, confidence)
    return replace(verdict, excluded_loss=max(0.0, -low))


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


def _is_within(interval: tuple[float, float], limit: float) -> bool:
    """Tell whether an interval lies between −limit and limit."""
    return -limit < interval[0] and interval[1] < limit
