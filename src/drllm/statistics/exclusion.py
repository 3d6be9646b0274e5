"""Whether candidates lose less than a limit, tested in an order that is fixed beforehand.

A candidate (a static path, or the routed model at some depth) passes where its comparison with base
excludes a loss of accuracy of the limit, and, where that has a limit too, such an increase of the
next-token loss; on every task. As all of it has to hold, no correction is due for there being
several limits and tasks (Berger 1982, Technometrics 24 (4)).

Several candidates are tested in an order fixed beforehand, from the fewest layers left out, up to
the first that fails. So each may be tested at the full level, and the chance that any candidate
passes wrongly stays what it is for one; see `pass_in_order`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from drllm.statistics.power import questions_to_exclude, rounded_up
from drllm.statistics.verdicts import FEWEST_TEXTS, Differences, Verdict

T = TypeVar("T")


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The losses to exclude: points of accuracy, and nats a token of text unless it is None."""

    max_drop: float
    max_loss_increase: float | None = None

    def __str__(self) -> str:
        accuracy = f"{self.max_drop:g} points of accuracy"
        if self.max_loss_increase is None:
            return accuracy
        return f"{accuracy} and {self.max_loss_increase:g} nats a token of text"


class TaskTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One candidate tested on one task; empty `failures` mean that it passes.

    `needed` is about how many questions (of next-token loss, texts) would do where too few are all
    that is amiss, were the differences those that were measured.
    """

    task: str
    failures: tuple[str, ...] = ()
    needed: int | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One candidate tested on every task."""

    name: str
    tasks: tuple[TaskTest, ...]

    @property
    def passed(self) -> bool:
        """Whether it loses less than the limits on every task."""
        return not any(test.failures for test in self.tasks)

    def reason(self) -> str:
        """Say why it fails, task by task."""
        reasons = []
        for test in self.tasks:
            if test.failures:
                where = f" on {test.task}" if len(self.tasks) > 1 else ""
                reasons.append(" and ".join(test.failures) + where)
        return ", and ".join(reasons)

    def remedy(self) -> str:
        """Say how many questions would probably pass; empty where no number would."""
        needed = [test.needed for test in self.tasks if test.failures]
        numbers = [number for number in needed if number is not None]
        if not numbers or len(numbers) < len(needed):
            return ""
        questions = f"{rounded_up(max(numbers)):,} questions"
        return f"about {questions} would probably show it if the differences stay the same"


class DropTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which candidates lose less than the limits; `docs/formats.md` has the fields.

    `trials` are in the fixed order; all but the last passed, or all of them. What comes after the
    first failure is `untested`.
    """

    limits: Limits
    trials: tuple[Trial, ...]
    untested: tuple[str, ...] = ()

    @property
    def chosen(self) -> str | None:
        """The last candidate that passed, which leaves out most layers; None if none did."""
        names = [trial.name for trial in self.trials if trial.passed]
        return names[-1] if names else None

    def sentence(self) -> str:
        """Say in one sentence what is shown, or why nothing is and how many questions would do."""
        last = self.trials[-1]
        if self.chosen is None:
            reason = last.reason()
            if last.remedy():
                reason += f"; {last.remedy()}"
            return f"Not shown that {last.name} loses less than {self.limits}: {reason}."
        shown = f"Shown (95 %): {self.chosen} loses less than {self.limits}"
        if self.limits.max_loss_increase is None:
            shown += " (its text isn't tested without --max-loss-increase)"
        if last.passed:
            return f"{shown}."
        return f"{shown}; not shown for {last.name}, the next in order: {last.reason()}."


def pass_in_order(candidates: Sequence[T], passes: Callable[[T], bool]) -> int:
    """Return how many candidates pass before the first that fails; later ones aren't tested.

    Where the order is fixed before any result is known, each candidate may be tested at the full
    level α: the probability that any candidate passes wrongly is at most α, since the first one
    that should fail has to pass wrongly before a later one is tested. Choosing the best of all that
    pass, or an order by results, would need a correction.

    Args:
        candidates: What is tested, in the fixed order.
        passes: The test of one candidate, at the level α.

    Source: Maurer, Hothorn and Lehmacher 1995; Westfall and Krishen 2001, Journal of Statistical
        Planning and Inference 99.

    Example:
        >>> pass_in_order([1, 2, 9, 3], lambda loss: loss < 5)
        2
    """
    for number, candidate in enumerate(candidates):
        if not passes(candidate):
            return number
    return len(candidates)


def exclude_drop(
    candidates: Mapping[str, Mapping[str, Differences | None]], limits: Limits
) -> DropTest:
    """Test candidates in their order.

    Args:
        candidates: For each candidate, in the fixed order, how it differs from base on each task;
            None where it wasn't evaluated.
        limits: The losses that are to be excluded.
    """
    if not candidates:
        raise ValueError("there is no candidate to test")
    trials = []
    for name, by_task in candidates.items():
        tests = tuple(_test(task, found, limits) for task, found in by_task.items())
        trials.append(Trial(name=name, tasks=tests))
    num_passed = pass_in_order(trials, lambda trial: trial.passed)
    tested = trials[: num_passed + 1]
    untested = tuple(trial.name for trial in trials[num_passed + 1 :])
    return DropTest(limits=limits, trials=tuple(tested), untested=untested)


def _test(task: str, differences: Differences | None, limits: Limits) -> TaskTest:
    """Test one candidate on one task."""
    if differences is None:
        return TaskTest(task=task, failures=("it was not evaluated",))
    failures: list[str] = []
    needed: list[int | None] = []
    accuracy = differences.accuracy
    drop = limits.max_drop / 100
    if accuracy.shown == "guessing":
        failures.append("base is not shown to be above chance")
        needed.append(None)
    elif not _is_excluded(accuracy, drop):
        failures.append(f"a loss of up to {accuracy.write_excluded()} points is not excluded")
        needed.append(_needed(accuracy, drop))
    if limits.max_loss_increase is not None:
        _test_text(differences.text_loss, limits.max_loss_increase, failures, needed)
    numbers = [number for number in needed if number is not None]
    total = max(numbers) if numbers and len(numbers) == len(needed) else None
    return TaskTest(task=task, failures=tuple(failures), needed=total)


def _test_text(
    loss: Verdict | None, limit: float, failures: list[str], needed: list[int | None]
) -> None:
    """Add why an increase of the next-token loss isn't excluded, and how many texts would do."""
    if loss is None:
        failures.append("no next-token loss is known")
        needed.append(None)
    elif loss.excluded_loss is None:
        failures.append(f"{loss.n} texts are too few to exclude any increase of their loss")
        needed.append(FEWEST_TEXTS if loss.n < FEWEST_TEXTS else None)
    elif not _is_excluded(loss, limit):
        failures.append(
            f"an increase of the next-token loss by up to {loss.write_excluded()} nats is not "
            f"excluded"
        )
        needed.append(_needed(loss, limit))


def _is_excluded(verdict: Verdict, limit: float) -> bool:
    return verdict.excluded_loss is not None and verdict.excluded_loss < limit


def _needed(verdict: Verdict, limit: float) -> int | None:
    loss = verdict.mean if verdict.quantity == "text_loss" else -verdict.mean
    end = max(verdict.excluded_loss or 0.0, loss)
    return questions_to_exclude(verdict.n, loss, end, limit)
