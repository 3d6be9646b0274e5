"""The depth curve: systems at several depths, on the same questions and the same texts.

Owns what a point of the curve is, and its row in a file or table with paired differences to base.
Outcomes by question stay with whoever made them: a point refers to them. Leaves running the
systems to others, and which point may be recommended to `certified`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from drllm.cost import share_saved
from drllm.evaluation.findings import ALPHA, FEWEST_DIFFERENT, ROUNDING
from drllm.statistics.intervals import mean_interval, wilson_interval
from drllm.statistics.paired import mcnemar_exact, paired_interval


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a system did, question by question and text by text.

    Attributes:
        correct: One per question: 1 for right and 0 for wrong, or the share of several draws.
        gold_logprob: One per question, in nats; empty where it isn't known.
        text_loss: One per held-out text, in nats a token: the mean next-token loss over the text.
            Texts count alike, however long. Empty where none was read.
        worked_loss: The same, one per worked answer of another task; empty where none was read.
    """

    correct: Sequence[float]
    gold_logprob: Sequence[float] = ()
    text_loss: Sequence[float] = ()
    worked_loss: Sequence[float] = ()

    @property
    def is_single(self) -> bool:
        """Whether each question was answered once, so that it is right or wrong."""
        return all(value in (0, 1) for value in self.correct)


@dataclass(frozen=True, slots=True)
class Point:
    """One system at one setting of its depth.

    Attributes:
        system: Its name ("routed", "last k skipped").
        setting: In words, for whoever reads the table ("20 % saved").
        executions: Mean over the questions, a forward pass, in layer equivalents.
        outcomes: By question and text.
    """

    system: str
    setting: str
    executions: float
    outcomes: Outcomes

    @property
    def name(self) -> str:
        """System and setting."""
        return f"{self.system}, {self.setting}" if self.setting else self.system

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return fmean(self.outcomes.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy, over questions."""
        if self.outcomes.is_single:
            correct = self.outcomes.correct
            return wilson_interval(round(sum(correct)), len(correct))
        return mean_interval(self.outcomes.correct, 0)

    @property
    def gold_logprob(self) -> float | None:
        """Mean log-probability of the gold answers in nats, where known."""
        return fmean(self.outcomes.gold_logprob) if self.outcomes.gold_logprob else None

    @property
    def text_loss(self) -> float | None:
        """Mean next-token loss on held-out texts in nats a token, where read."""
        return fmean(self.outcomes.text_loss) if self.outcomes.text_loss else None


def won_lost(first: Outcomes, second: Outcomes) -> tuple[int, int]:
    """Count the questions that the first has right and the second wrong, and the other way round.

    Raises:
        ValueError: Another number of questions, or answers that are neither right nor wrong.

    Example:
        >>> won_lost(Outcomes([1, 0, 1]), Outcomes([1, 1, 0]))
        (1, 1)
    """
    if not (first.is_single and second.is_single):
        raise ValueError("only answers that are right or wrong can be won or lost: one a question")
    pairs = list(zip(first.correct, second.correct, strict=True))
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def curve_rows(
    base: Point, points: Sequence[Point], num_layers: int, seed: int
) -> list[dict[str, Any]]:
    """Return the curve as rows for a file, each with its differences to base and to routed.

    Args:
        base: The untouched model on the same questions and texts.
        points: In any order.
        num_layers: L.
        seed: Of the resampling.

    Returns:
        Base first, then each system's points from the most executions to the fewest, systems in
        the order of their first point; `against_base` and, for baselines, `routed_against` (what
        the routed model of the same setting has more) as from `differences`.

    Raises:
        ValueError: Points on another number of questions or texts.
    """
    systems = list(dict.fromkeys(point.system for point in points))
    ordered = sorted(points, key=lambda point: (systems.index(point.system), -point.executions))
    routed = {point.setting: point for point in points if point.system == "routed"}

    def row(point: Point) -> dict[str, Any]:
        ours = None if point is base else routed.get(point.setting)
        return {
            "system": point.system,
            "setting": point.setting,
            "executions": point.executions,
            "saved": share_saved(point.executions, num_layers),
            "accuracy": point.accuracy,
            "interval": list(point.interval),
            "gold_logprob": point.gold_logprob,
            "text_loss": point.text_loss,
            "against_base": None if point is base else more_than(point, base),
            "routed_against": None if ours is None or ours is point else more_than(ours, point),
        }

    def more_than(ours: Point, theirs: Point) -> dict[str, Any]:
        return differences(ours.outcomes, theirs.outcomes, seed)

    return [row(point) for point in (base, *ordered)]


def differences(ours: Outcomes, theirs: Outcomes, seed: int) -> dict[str, Any]:
    """Return what one system has more than another, question by question and text by text.

    Args:
        ours: Of the system that a gain is a gain of.
        theirs: On the same questions and texts.
        seed: Of the resampling.

    Returns:
        `accuracy` as a share, `gold_logprob` in nats a question, `text_loss` in nats a token; None
        where either side doesn't know it. Each is a mean with its 95 % interval, and `shown`:
        "higher" or "lower" where that is shown at the 5 % level (right and wrong answers by the
        exact McNemar test, others by the interval, if enough of them differ at all), else None.

    Raises:
        ValueError: Another number of questions or texts.
    """
    found = {
        "accuracy": _difference(ours.correct, theirs.correct, seed),
        "gold_logprob": _difference(ours.gold_logprob, theirs.gold_logprob, seed),
        "text_loss": _difference(ours.text_loss, theirs.text_loss, seed),
    }
    if ours.is_single and theirs.is_single and found["accuracy"] is not None:
        won, lost = won_lost(ours, theirs)
        more = "higher" if won > lost else "lower"
        found["accuracy"] |= {
            "interval": list(paired_interval(won, lost, len(ours.correct))),
            "shown": more if mcnemar_exact(won, lost) < ALPHA else None,
        }
    return found


def _difference(ours: Sequence[float], theirs: Sequence[float], seed: int) -> dict[str, Any] | None:
    if not ours or not theirs:
        return None
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    low, high = mean_interval(values, seed)
    shown = None
    if sum(abs(value) > ROUNDING for value in values) >= FEWEST_DIFFERENT:
        shown = "higher" if low > 0 else "lower" if high < 0 else None
    return {"mean": fmean(values), "interval": [low, high], "shown": shown}
