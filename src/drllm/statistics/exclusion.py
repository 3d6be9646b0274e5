"""Tests whether candidates lose less than a limit, one after another (`evaluate --max-drop`).

A candidate is a static path, or the routed model at some depth. It passes if its comparison with
base excludes a loss of accuracy as large as the limit, on every task. If the next-token loss has a
limit too, an increase as large as that limit must be excluded as well. A candidate must pass all of
these tests, so they need no correction for their number (Berger 1982, Technometrics 24 (4)).

The candidates are tested in an order that is fixed before any result is known. Testing ends when a
candidate fails. So the probability that any candidate passes wrongly is no larger than for a single
candidate; `pass_in_order` explains why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from drllm.statistics.differences import Differences, Verdict
from drllm.statistics.power import questions_to_exclude, round_up
from drllm.statistics.ranges import Amount, Count
from drllm.statistics.verdicts import FEWEST_TEXTS

T = TypeVar("T")


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The losses to exclude: points of accuracy, and nats a token of text.

    `max_loss_increase` is None if the next-token loss isn't tested.
    """

    max_drop: Amount
    max_loss_increase: Amount | None = None

    def __str__(self) -> str:
        accuracy = f"{self.max_drop:g} points of accuracy"
        if self.max_loss_increase is None:
            return accuracy
        return f"{accuracy} and {self.max_loss_increase:g} nats a token of text"


class TaskTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The test of one candidate on one task; the candidate passes if `failures` is empty.

    `failures` has the reasons why the candidate doesn't pass. `needed` estimates how many questions
    would probably be enough to pass if the differences stay as measured. For the next-token loss it
    is a number of texts. It is None if the candidate passes, or if no number would be enough.
    `loses` tells whether a loss beyond a limit is shown.
    """

    task: str
    failures: tuple[str, ...] = ()
    needed: Count | None = None
    loses: bool = False


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tests of one candidate on every task."""

    name: str
    tasks: tuple[TaskTest, ...]

    @property
    def passed(self) -> bool:
        """Whether the candidate is shown to lose less than the limits on every task."""
        return not any(test.failures for test in self.tasks)

    @property
    def failed(self) -> list[TaskTest]:
        """The tests that the candidate doesn't pass."""
        return [test for test in self.tasks if test.failures]

    @property
    def needed(self) -> int | None:
        """About how many questions would probably be enough; None if no number would."""
        return _find_largest([test.needed for test in self.failed])

    def reason(self, names: Mapping[str, str] | None = None) -> str:
        """Say why the candidate fails, task by task.

        Args:
            names: Task → what it is called in the sentence. Without names, an only task isn't
                named.
        """
        reasons = []
        for test in self.failed:
            reason = " and ".join(test.failures)
            if names is not None:
                reason += f" on {names[test.task]}"
            elif len(self.tasks) > 1:
                reason += f" on {test.task}"
            reasons.append(reason)
        return ", and ".join(reasons)

    def remedy(self, what: str = "questions") -> str:
        """Say how many questions would probably be enough; return "" if no number would.

        Args:
            what: What the questions are called, such as "held-out questions".
        """
        if self.needed is None:
            return ""
        questions = f"{round_up(self.needed):,} {what}"
        return f"about {questions} would probably show it if the differences stay the same"


class DropTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which candidates lose less than the limits; `docs/formats.md` describes the fields.

    `trials` are in the fixed order, and only the last trial may have failed. `untested` has the
    names of the candidates that come after the failed trial.
    """

    limits: Limits
    trials: tuple[Trial, ...]
    untested: tuple[str, ...] = ()

    @property
    def chosen(self) -> str | None:
        """The last candidate that passed; None if none passed."""
        chosen = None
        for trial in self.trials:
            if trial.passed:
                chosen = trial.name
        return chosen

    def remedy(self) -> str:
        """Say how many questions would probably be enough for the candidate that was tested last.

        The loss of text is measured on at most `--num-texts` questions, so the sentence names this
        setting where the loss is tested. It is empty if no number would be enough.
        """
        what = "questions"
        if self.limits.max_loss_increase is not None:
            what = "questions and texts (--num-texts)"
        return self.trials[-1].remedy(what)

    def sentence(self) -> str:
        """Say in one sentence what is shown.

        If no candidate passed, the sentence says why, and how many questions would be enough.
        """
        last = self.trials[-1]
        if self.chosen is None:
            reason = last.reason()
            remedy = self.remedy()
            if remedy:
                reason += f"; {remedy}"
            return f"Not shown that {last.name} loses less than {self.limits}: {reason}."
        shown = f"Shown (95 %): {self.chosen} loses less than {self.limits}"
        if self.limits.max_loss_increase is None:
            shown += " (its text isn't tested without --max-loss-increase)"
        if last.passed:
            return f"{shown}."
        return f"{shown}; not shown for {last.name}, the next in order: {last.reason()}."


def pass_in_order(candidates: Sequence[T], passes: Callable[[T], bool]) -> int:
    """Return how many candidates pass before the first fails; later candidates aren't tested.

    If the order is fixed before any result is known, each candidate may be tested at the full level
    α, and α is also the limit for all candidates together. The reason is the first candidate that
    should fail. Usually it fails, and testing ends without an error. It passes wrongly with a
    probability of at most α, and only then can later candidates pass wrongly too.

    A correction would be needed if candidates were ordered by their results, or if all were tested
    and the best that passes were chosen.

    Args:
        candidates: The candidates in the fixed order.
        passes: Tests a candidate at the level α.

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
    """Test candidates in their order until the first fails.

    Args:
        candidates: Name of a candidate → task → how the candidate differs from base on the task.
            The difference is None if the candidate wasn't evaluated on the task. The candidates are
            in the fixed order.
        limits: The losses to exclude.

    Raises:
        ValueError: There are no candidates.
    """
    if not candidates:
        raise ValueError("there is no candidate to test")
    trials = []
    for name, by_task in candidates.items():
        tests = [judge_task(task, by_task[task], limits) for task in by_task]
        trials.append(Trial(name=name, tasks=tuple(tests)))
    return end_at_failure(trials, limits)


def end_at_failure(trials: Sequence[Trial], limits: Limits) -> DropTest:
    """Return the trials up to the first that fails; the candidates after it aren't tested.

    Args:
        trials: The trials of all candidates, in an order that was fixed before any result.
        limits: The losses to exclude.
    """
    num_passed = pass_in_order(trials, lambda trial: trial.passed)
    num_tested = num_passed + 1  # with the first that fails, if any fails
    untested = tuple(trial.name for trial in trials[num_tested:])
    return DropTest(limits=limits, trials=tuple(trials[:num_tested]), untested=untested)


class _Failure(NamedTuple):
    """Why a loss as large as a limit isn't excluded, and how many questions would be enough.

    `needed` is an estimate. It is None if no number would be enough. `loses` tells whether a loss
    beyond the limit is shown.
    """

    reason: str
    needed: int | None = None
    loses: bool = False


def judge_task(task: str, differences: Differences | None, limits: Limits) -> TaskTest:
    """Test one candidate on the questions of one task.

    Args:
        task: The task.
        differences: The candidate minus base; None if it wasn't evaluated on the task.
        limits: The losses to exclude.
    """
    if differences is None:
        return TaskTest(task=task, failures=("it was not evaluated",))
    failures: list[_Failure] = []
    failures += _test_accuracy(differences.accuracy, limits.max_drop / 100)
    if limits.max_loss_increase is not None:
        failures += _test_text(differences.text_loss, limits.max_loss_increase)
    return _make_test(task, failures)


def judge_texts(source: str, loss: Verdict, max_loss_increase: float) -> TaskTest:
    """Test one candidate on texts alone.

    Args:
        source: The name of the texts.
        loss: The candidate's next-token loss minus base's.
        max_loss_increase: The increase to exclude, in nats a token.
    """
    return _make_test(source, _test_text(loss, max_loss_increase))


def _make_test(name: str, failures: Sequence[_Failure]) -> TaskTest:
    """Return a test with its failures, and the largest number of questions that they need."""
    reasons = tuple(failure.reason for failure in failures)
    needed = _find_largest([failure.needed for failure in failures])
    loses = any(failure.loses for failure in failures)
    return TaskTest(task=name, failures=reasons, needed=needed, loses=loses)


def _find_largest(numbers: Sequence[int | None]) -> int | None:
    """Return the largest number; None if there is no number, or if an item is None."""
    largest = None
    for number in numbers:
        if number is None:
            return None
        if largest is None or number > largest:
            largest = number
    return largest


def _test_accuracy(accuracy: Verdict, limit: float) -> list[_Failure]:
    """Return why a loss of accuracy isn't excluded; an empty list if it is excluded."""
    if accuracy.shown == "guessing":
        return [_Failure("base is not shown to be above chance")]
    if _is_excluded(accuracy, limit):
        return []
    if _is_beyond(accuracy, limit):
        return [_Failure(f"a loss of {_write_shown_loss(accuracy)} points is shown", loses=True)]
    reason = f"a loss of up to {accuracy.write_excluded(limit)} points is not excluded"
    return [_Failure(reason, _estimate_needed(accuracy, limit))]


def _test_text(loss: Verdict | None, limit: float) -> list[_Failure]:
    """Return why an increase of the next-token loss isn't excluded; an empty list if it is."""
    if loss is None:
        return [_Failure("no next-token loss is known")]
    if loss.excluded_loss is None:
        reason = f"{loss.n} texts are too few to exclude any increase of their loss"
        needed = None
        if loss.n < FEWEST_TEXTS:
            needed = FEWEST_TEXTS
        return [_Failure(reason, needed)]
    if _is_excluded(loss, limit):
        return []
    if _is_beyond(loss, limit):
        size = _write_shown_loss(loss)
        reason = f"an increase of the next-token loss by {size} nats is shown"
        return [_Failure(reason, loses=True)]
    increase = f"an increase of the next-token loss by up to {loss.write_excluded(limit)} nats"
    return [_Failure(f"{increase} is not excluded", _estimate_needed(loss, limit))]


def _is_excluded(verdict: Verdict, limit: float) -> bool:
    """Tell whether a verdict excludes a loss as large as the limit."""
    return verdict.excluded_loss is not None and verdict.excluded_loss < limit


def _is_beyond(verdict: Verdict, limit: float) -> bool:
    """Tell whether a loss larger than the limit is shown."""
    return verdict.shown_loss is not None and verdict.shown_loss[0] > limit


def _write_shown_loss(verdict: Verdict) -> str:
    """Write the interval of a loss that is shown."""
    assert verdict.shown_loss is not None
    smallest, largest = (verdict.write(end).removeprefix("+") for end in verdict.shown_loss)
    return f"{smallest} to {largest}"


def _estimate_needed(verdict: Verdict, limit: float) -> int | None:
    """Estimate how many questions or texts would probably exclude a loss as large as the limit."""
    loss = -verdict.mean
    if verdict.quantity == "text_loss":  # the only quantity whose increase is a loss
        loss = verdict.mean
    end = max(verdict.excluded_loss or 0.0, loss)
    return questions_to_exclude(verdict.n, loss, end, limit)
