"""Tests whether candidates lose less than a limit, one after another (`evaluate --max-drop`).

A candidate is a static path, or the routed model at some depth. It passes if its comparison with
base excludes a loss of accuracy as large as the limit, on every task. If the next-token loss has a
limit too, an increase as large as that limit must be excluded as well. A candidate must pass all of
these tests, so they need no correction for their number (Berger 1982, Technometrics 24 (4)).

The order of the candidates is fixed before any result is known, and the candidate that leaves out
the fewest layers comes first. Testing ends when a candidate fails. So each candidate is tested at
the full level, and the probability that any candidate passes wrongly is no larger than for a single
candidate; see `pass_in_order`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from drllm.statistics.power import questions_to_exclude, round_up
from drllm.statistics.verdicts import FEWEST_TEXTS, Differences, Verdict

T = TypeVar("T")


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The losses to exclude: points of accuracy, and nats a token of text.

    `max_loss_increase` is None if the next-token loss isn't tested.
    """

    max_drop: float
    max_loss_increase: float | None = None

    def __str__(self) -> str:
        accuracy = f"{self.max_drop:g} points of accuracy"
        if self.max_loss_increase is None:
            return accuracy
        return f"{accuracy} and {self.max_loss_increase:g} nats a token of text"


class TaskTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The test of one candidate on one task; the candidate passes if `failures` is empty.

    `failures` says why the candidate doesn't pass. `needed` is about how many questions (texts, for
    the next-token loss) would probably be enough to pass if the differences stay as measured. It is
    None if no number would be enough.
    """

    task: str
    failures: tuple[str, ...] = ()
    needed: int | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tests of one candidate on every task."""

    name: str
    tasks: tuple[TaskTest, ...]

    @property
    def passed(self) -> bool:
        """Whether the candidate loses less than the limits on every task."""
        return not any(test.failures for test in self.tasks)

    def reason(self) -> str:
        """Say why the candidate fails, task by task."""
        reasons = []
        for test in self.tasks:
            if test.failures:
                where = f" on {test.task}" if len(self.tasks) > 1 else ""
                reasons.append(" and ".join(test.failures) + where)
        return ", and ".join(reasons)

    def remedy(self) -> str:
        """Say how many questions would probably be enough; return "" if no number would."""
        needed = [test.needed for test in self.tasks if test.failures]
        numbers = [number for number in needed if number is not None]
        if not numbers or len(numbers) < len(needed):
            return ""
        questions = f"{round_up(max(numbers)):,} questions"
        return f"about {questions} would probably show it if the differences stay the same"


class DropTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which candidates lose less than the limits; `docs/formats.md` describes the fields.

    `trials` are in the fixed order, and only the last trial may have failed. `untested` names the
    candidates after it.
    """

    limits: Limits
    trials: tuple[Trial, ...]
    untested: tuple[str, ...] = ()

    @property
    def chosen(self) -> str | None:
        """The last candidate that passed: it leaves out the most layers. None if none passed."""
        names = [trial.name for trial in self.trials if trial.passed]
        return names[-1] if names else None

    def sentence(self) -> str:
        """Say in one sentence what is shown.

        If nothing is shown, the sentence has the reason, and how many questions would be enough.
        """
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
    """Return how many candidates pass before one fails; the candidates after it aren't tested.

    If the order is fixed before any result is known, each candidate may be tested at the full level
    α. The first candidate that should fail either fails, which ends the test, or passes wrongly,
    which has a probability of at most α. So α is also the limit for all candidates together.
    Choosing the best candidate that passes, or ordering candidates by results, would need a
    correction.

    Args:
        candidates: The candidates in the fixed order.
        passes: Tests one candidate at the level α.

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
    """Test candidates in their order until one fails.

    Args:
        candidates: For each candidate, in the fixed order, how it differs from base on each task;
            None if it wasn't evaluated there.
        limits: The losses to exclude.
    """
    if not candidates:
        raise ValueError("there is no candidate to test")
    trials = []
    for name, by_task in candidates.items():
        tests = [_test_on_task(task, by_task[task], limits) for task in by_task]
        trials.append(Trial(name=name, tasks=tuple(tests)))
    num_passed = pass_in_order(trials, lambda trial: trial.passed)
    tested = trials[: num_passed + 1]
    untested = tuple(trial.name for trial in trials[num_passed + 1 :])
    return DropTest(limits=limits, trials=tuple(tested), untested=untested)


class _Failure(NamedTuple):
    """Why a limit isn't kept, and about how many questions would be enough.

    `needed` is None if no number would be enough.
    """

    reason: str
    needed: int | None = None


def _test_on_task(task: str, differences: Differences | None, limits: Limits) -> TaskTest:
    """Test one candidate on one task."""
    if differences is None:
        return TaskTest(task=task, failures=("it was not evaluated",))
    failures: list[_Failure] = []
    failures += _test_accuracy(differences.accuracy, limits.max_drop / 100)
    if limits.max_loss_increase is not None:
        failures += _test_text(differences.text_loss, limits.max_loss_increase)
    reasons = tuple(failure.reason for failure in failures)
    numbers = [failure.needed for failure in failures if failure.needed is not None]
    needed = None
    if numbers and len(numbers) == len(failures):
        needed = max(numbers)
    return TaskTest(task=task, failures=reasons, needed=needed)


def _test_accuracy(accuracy: Verdict, limit: float) -> list[_Failure]:
    """Return why a loss of accuracy isn't excluded; an empty list if it is excluded."""
    if accuracy.shown == "guessing":
        return [_Failure("base is not shown to be above chance")]
    if _is_excluded(accuracy, limit):
        return []
    reason = f"a loss of up to {accuracy.write_excluded()} points is not excluded"
    return [_Failure(reason, _estimate_needed(accuracy, limit))]


def _test_text(loss: Verdict | None, limit: float) -> list[_Failure]:
    """Return why an increase of the next-token loss isn't excluded; an empty list if it is."""
    if loss is None:
        return [_Failure("no next-token loss is known")]
    if loss.excluded_loss is None:
        reason = f"{loss.n} texts are too few to exclude any increase of their loss"
        return [_Failure(reason, FEWEST_TEXTS if loss.n < FEWEST_TEXTS else None)]
    if _is_excluded(loss, limit):
        return []
    increase = f"an increase of the next-token loss by up to {loss.write_excluded()} nats"
    return [_Failure(f"{increase} is not excluded", _estimate_needed(loss, limit))]


def _is_excluded(verdict: Verdict, limit: float) -> bool:
    """Tell whether a verdict excludes a loss as large as the limit."""
    return verdict.excluded_loss is not None and verdict.excluded_loss < limit


def _estimate_needed(verdict: Verdict, limit: float) -> int | None:
    """Estimate how many questions or texts would probably exclude a loss as large as the limit."""
    loss = -verdict.mean
    if verdict.quantity == "text_loss":
        loss = verdict.mean
    end = max(verdict.excluded_loss or 0.0, loss)
    return questions_to_exclude(verdict.n, loss, end, limit)
