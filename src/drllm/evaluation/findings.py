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
from drllm.evaluation.statistics import paired_bootstrap, paired_interval

ALPHA = 0.05
FEWEST_DIFFERENT = 6
"""Questions that must differ before a resampled interval may carry a verdict: on fewer, not even
a sign test on differences that all point one way can be significant (2 / 2**5 > 0.05)."""
ROUNDING = 1e-4
"""Differences up to here, in nats or points, are those of arithmetic in another order."""
MENTIONED = 0.01
"""Share of routes unchanged by the permutation above which it is said."""


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
) -> list[str]:
    """Return what a reader may conclude, one sentence per question asked.

    Args:
        task: The task's name.
        rows: The table's rows by system.
        correct: Per question, the share of draws answered right, by system.
        gold_logprob: Per question, the gold option's log-probability in nats, by system.
        num_routes: Distinct routes that the routed model took.
        chance: Accuracy of guessing.
        num_layers: L.
        seed: Of the bootstrap.

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
    sentences.append(
        f"The routed model runs {routed['executions']:.2f} of {num_layers} layers a forward pass "
        + (f"({saved:.1f} % saved)" if saved >= 0 else f"({-saved:.1f} % more than the base)")
        + f" and answers {100 * routed['accuracy']:.1f} % of {n} questions right, the base model "
        f"{100 * base['accuracy']:.1f} %: {_accuracy(routed, n, judged=above_chance)}."
    )
    change = _change(gold_logprob["routed"], gold_logprob["base"], seed)
    numbers = change.words(" nats a question", digits=3)
    verdict = change.verdict("is lower", "is higher", "is not shown to differ")
    sentences.append(
        f"The gold answer's log-probability among the options {verdict} under routing ({numbers})."
        if above_chance
        else f"Routing changes the gold answer's log-probability among the options by {numbers}."
    )
    if "permuted routes" in rows:
        points = {name: [100 * share for share in shares] for name, shares in correct.items()}
        change = _change(points["routed"], points["permuted routes"], seed)
        unchanged = rows["permuted routes"]["unchanged_routes"]
        sentences.append(_against_permuted(change, num_routes, unchanged, judged=above_chance))
    return sentences


# --- differences that are no counts ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    """A mean difference over questions with its resampled interval.

    Attributes:
        mean: Of the differences.
        lower: End of the 95 % interval.
        upper: Its other end.
        differing: Questions whose difference is more than rounding.
    """

    mean: float
    lower: float
    upper: float
    differing: int

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
    lower, upper = paired_bootstrap(differences, seed)
    differing = sum(d != 0 for d in differences)
    return _Change(sum(differences) / len(differences), lower, upper, differing)


# --- sentences ---------------------------------------------------------------------------------


def _accuracy(routed: Mapping[str, Any], n: int, *, judged: bool) -> str:
    won, lost, p = routed["won"], routed["lost"], routed["mcnemar_p"]
    lower, upper = (100 * bound for bound in paired_interval(won, lost, n))
    numbers = (
        f"{100 * (won - lost) / n:+.1f} points, 95 % interval {lower:+.1f} to {upper:+.1f}, "
        f"won {won}, lost {lost}, exact McNemar p = {p:.3g}"
    )
    if routed["mcnemar_p_holm"] is not None:
        p = routed["mcnemar_p_holm"]
        numbers += f", corrected for several tasks {p:.3g}"
    if not judged:
        return numbers
    if p < ALPHA:
        return f"routing {'gains' if won > lost else 'loses'} accuracy ({numbers})"
    excluded = "" if lower >= 0 else f"; a loss of up to {-lower:.1f} points is not excluded"
    return f"no difference is shown ({numbers}){excluded}"


def _against_permuted(change: _Change, num_routes: int, unchanged: float, *, judged: bool) -> str:
    if num_routes == 1:
        return "All questions took one route, so permuting says nothing."
    sentence = (
        f"Against its own routes permuted over the questions the routed model is at "
        f"{change.words(' points', digits=1)}"
    )
    if judged:
        sentence += ": " + change.verdict(
            "the routes do better on other questions than on their own",
            "the match of route and question matters",
            "it is not shown that reading the question matters",
        )
    if unchanged > MENTIONED:
        sentence += f"; {100 * unchanged:.1f} % of the questions kept their route by chance"
    return sentence + "."
