"""The sentences under the table: what the numbers allow to be said, and nothing more.

Owns the wording and the rules for when a difference is called one. Every sentence is computed
from per-question outcomes; none can claim a gain that its paired test doesn't show, and where
the base model may be guessing all of them give numbers without a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drllm.cost import share_saved
from drllm.statistics.intervals import mean_interval
from drllm.statistics.paired import mcnemar_exact, paired_interval
from drllm.statistics.power import detectable, detectable_mean

ALPHA = 0.05
FEWEST_DIFFERENT = 6
"""Questions that must differ before a resampled interval may carry a verdict: on fewer, not even
a sign test on differences that all point one way can be significant (2 / 2**5 > 0.05)."""
ROUNDING = 1e-4
"""Differences up to here, in nats or points, are those of arithmetic in another order."""
MENTIONED = 0.01
"""Share of routes unchanged by the permutation above which it is said."""
NOT_SHOWN = "it is not shown that reading the question matters"


def findings(
    *,
    task: str,
    rows: Mapping[str, Mapping[str, Any]],
    correct: Mapping[str, Sequence[float]],
    gold_logprob: Mapping[str, Sequence[float]],
    num_routes: int,
    chance: float,
    num_layers: int,
    seed: int,
    num_tasks: int = 1,
) -> list[str]:
    """Return what a reader may conclude, one sentence per question asked.

    Args:
        task: The task's name.
        rows: The table's rows by system.
        correct: Per question, the share of draws answered right, by system.
        gold_logprob: Per question, the gold option's log-probability in nats, by system; empty
            where answers are generated.
        num_routes: Distinct routes that the routed model took.
        chance: Accuracy of guessing.
        num_layers: L.
        seed: Of the bootstrap.
        num_tasks: Tasks that the p-values are corrected for.

    Returns:
        Sentences on: whether the base is above chance, routed against base in accuracy, in gold
        log-probability, and routed against its own routes permuted.
    """
    base, routed = rows["base"], rows["routed"]
    n = len(correct["base"])
    saved = 100 * share_saved(routed["executions"], num_layers)
    above_chance = base["interval"][0] > chance
    sentences = []
    if not above_chance:
        sentences.append(
            f"On {task} the base model is not shown to be above chance ({100 * chance:.1f} %), so "
            f'no gain and no "no loss" can be claimed here.'
        )
    words = ("routing gains accuracy", "routing loses accuracy")
    against_base = (
        _averaged(correct["routed"], correct["base"], words=words, judged=above_chance, seed=seed)
        if routed["won"] is None  # graded, or averaged over draws: no counts
        else _counted(
            routed["won"],
            routed["lost"],
            n,
            words=words,
            judged=above_chance,
            corrected=routed["mcnemar_p_holm"],
            num_tests=num_tasks,
        )
    )
    sentences.append(
        f"The routed model runs {routed['executions']:.2f} of {num_layers} layers a forward pass "
        + (f"({saved:.1f} % saved)" if saved >= 0 else f"({-saved:.1f} % more than the base)")
        + f" and answers {100 * routed['accuracy']:.1f} % of {n} questions right, the base model "
        f"{100 * base['accuracy']:.1f} %: {against_base}."
    )
    if "routed" in gold_logprob:
        sentences.append(_options(gold_logprob, judged=above_chance, seed=seed))
    if "permuted routes" in rows:
        points = {name: [100 * share for share in shares] for name, shares in correct.items()}
        change = _change(points["routed"], points["permuted routes"], seed)
        unchanged = rows["permuted routes"]["unchanged_routes"]
        sentences.append(_against_permuted(change, num_routes, unchanged, judged=above_chance))
    return sentences


def _options(gold_logprob: Mapping[str, Sequence[float]], *, judged: bool, seed: int) -> str:
    change = _change(gold_logprob["routed"], gold_logprob["base"], seed)
    numbers = change.words(" nats a question", digits=3)
    if not judged:
        return f"Routing changes the gold answer's log-probability among the options by {numbers}."
    verdict = change.verdict("is lower", "is higher", "is not shown to differ")
    return (
        f"The gold answer's log-probability among the options {verdict} under routing ({numbers})."
    )


def compare(
    first: str,
    second: str,
    correct: Mapping[str, Sequence[float]],
    *,
    judged: bool,
    corrected: float | None = None,
    num_tests: int = 1,
    seed: int = 0,
) -> str:
    """Return what two systems' answers to the same questions allow to be said of them.

    Where each question was answered once, by the exact paired test. Where one system's accuracy is
    a mean over several draws, by the resampled interval of the difference; the p-value of such a
    comparison isn't known, and what it could have shown is an approximation.

    Args:
        first: Name of a system; a gain is its gain.
        second: Name of the other.
        correct: Per question, the share of draws answered right, by system.
        judged: False where base may be guessing: numbers without a verdict.
        corrected: The exact test's p-value, corrected for several tests; it decides.
        num_tests: How many tests that were.
        seed: Of the bootstrap.

    Returns:
        One sentence.

    Raises:
        ValueError: Another number of answers for one of them, or a corrected p-value where there
            is none.

    Example:
        >>> right = {"routed": [1.0] * 8 + [0.0] * 4, "last-k": [1.0] * 8 + [0.0] * 4}
        >>> compare("routed", "last-k", right, judged=False)[:53]
        'routed against last-k: +0.0 points, 95 % interval -24'
    """
    ours, theirs = correct[first], correct[second]
    pairs = list(zip(ours, theirs, strict=True))
    words = (f"{first} is more accurate", f"{first} is less accurate")
    if all(value in (0, 1) for pair in pairs for value in pair):
        verdict = _counted(
            sum(a > b for a, b in pairs),
            sum(a < b for a, b in pairs),
            len(pairs),
            words=words,
            judged=judged,
            corrected=corrected,
            num_tests=num_tests,
        )
    else:
        if corrected is not None:
            raise ValueError("means over several draws have no exact p-value to correct")
        verdict = _averaged(ours, theirs, words=words, judged=judged, seed=seed)
    return f"{first} against {second}: {verdict}."


# --- differences that are no counts ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    """A mean difference over questions with its resampled interval.

    Attributes:
        mean: Of the differences.
        lower: End of the 95 % interval.
        upper: Its other end.
        differing: Questions whose difference is more than rounding.
        detectable: Mean difference that would probably have been shown, where that is known.
    """

    mean: float
    lower: float
    upper: float
    differing: int
    detectable: float | None

    def words(self, unit: str, digits: int) -> str:
        """Write the mean and the interval, or why there is none."""
        mean = f"{self.mean:+.{digits}f}{unit}"
        if self.lower == self.upper:
            return f"{mean}, the same on every question, so resampling gives no interval"
        return f"{mean}, 95 % interval {self.lower:+.{digits}f} to {self.upper:+.{digits}f}"

    def verdict(self, below: str, above: str, neither: str) -> str:
        """Return the words that the interval allows."""
        if self.differing >= FEWEST_DIFFERENT and self.upper < 0:
            return below
        if self.differing >= FEWEST_DIFFERENT and self.lower > 0:
            return above
        return neither


def _change(first: Sequence[float], second: Sequence[float], seed: int) -> _Change:
    raw = [a - b for a, b in zip(first, second, strict=True)]
    differences = [d if abs(d) > ROUNDING else 0.0 for d in raw]
    lower, upper = mean_interval(differences, seed)
    differing = sum(d != 0 for d in differences)
    mean = sum(differences) / len(differences)
    shown = detectable_mean(differences) if differing >= FEWEST_DIFFERENT else None
    return _Change(mean, lower, upper, differing, shown)


# --- sentences ---------------------------------------------------------------------------------


def _counted(
    won: int,
    lost: int,
    n: int,
    *,
    words: tuple[str, str],
    judged: bool,
    corrected: float | None,
    num_tests: int,
) -> str:
    """Say what questions won and lost show; `words` are for a gain and for a loss."""
    p = mcnemar_exact(won, lost)
    lower, upper = (100 * bound for bound in paired_interval(won, lost, n))
    numbers = (
        f"{100 * (won - lost) / n:+.1f} points, 95 % interval {lower:+.1f} to {upper:+.1f}, "
        f"won {won}, lost {lost}, exact McNemar p = {p:.3g}"
    )
    if corrected is not None:
        p = corrected
        numbers += f", corrected for several tests {p:.3g}"
    if not judged:
        return numbers
    if p < ALPHA:
        return f"{words[0] if won > lost else words[1]} ({numbers})"
    # Of several tests the strictest of Holm's levels, so that no more is promised than holds.
    shown = detectable(n, (won + lost) / n, alpha=ALPHA / num_tests)
    said = f"no difference is shown ({numbers}); {_could_have_shown(n, shown)}"
    if lower < 0:
        said += f", and a loss of up to {-lower:.1f} points is not excluded"
    return said


def _averaged(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    words: tuple[str, str],
    judged: bool,
    seed: int,
) -> str:
    """Say what accuracies that are means over draws show."""
    n = len(ours)
    change = _change([100 * a for a in ours], [100 * b for b in theirs], seed)
    numbers = change.words(" points", digits=1)
    if not judged:
        return numbers
    verdict = change.verdict(words[1], words[0], "")
    if verdict:
        return f"{verdict} ({numbers})"
    said = f"no difference is shown ({numbers})"
    if change.detectable is not None:
        said += f"; n = {n} could have shown about {change.detectable:.1f} points"
    return said


def _could_have_shown(n: int, difference: float | None) -> str:
    """Say what difference would have been shown with 80 % probability, given as a share."""
    if difference is None:
        return f"n = {n} couldn't have shown any"
    return f"n = {n} could have shown {100 * difference:.1f} points"


def _against_permuted(change: _Change, num_routes: int, unchanged: float, *, judged: bool) -> str:
    if num_routes == 1:
        return "All questions took one route, so permuting says nothing."
    sentence = (
        f"Against its own routes permuted over the questions the routed model is at "
        f"{change.words(' points', digits=1)}"
    )
    if judged:
        verdict = change.verdict(
            "the routes do better on other questions than on their own",
            "the match of route and question matters",
            NOT_SHOWN,
        )
        sentence += f": {verdict}"
        if verdict == NOT_SHOWN and change.detectable is not None:
            sentence += f", where about {change.detectable:.1f} points could have been shown"
    if unchanged > MENTIONED:
        sentence += f"; {100 * unchanged:.1f} % of the questions kept their route by chance"
    return sentence + "."
