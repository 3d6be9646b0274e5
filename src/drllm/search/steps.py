"""The steps of a batch of questions: a round, the late margins, or a part of the re-test.

`BatchSteps` evaluates a step, or reads what an interrupted search has kept of it. `BatchProgress`
counts the work.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import full_decisions
from drllm.records.codec import hash_values
from drllm.search.evaluator import JudgedOutcome
from drllm.search.questions import SearchQuestion
from drllm.search.retest import Evaluate, pairs_to_retest
from drllm.work.run import OnStep
from drllm.work.store import ResultStore


class OnFirstRound(Protocol):
    """Called after the first round of a batch, in which every question's full path ran."""

    def __call__(
        self, questions: Sequence[SearchQuestion], outcomes: Mapping[Pair, JudgedOutcome], /
    ) -> None:
        """Receive the outcomes of the round; a pair's number is the place of its question."""


@dataclass
class BatchProgress:
    """Counts the runs of a batch, and reports their share of an estimated total.

    A run is a path on one prompt. A path runs once in the rounds, and once more for each other
    prompt of a re-test. A right generated answer counts once more for its margin.
    """

    num_simulations: int  # maximum number of simulations of a question
    num_retests: Sequence[int]  # for each question, the number of its other prompts
    has_late_margins: bool  # whether right answers get their margins after the rounds
    on_step: OnStep | None
    num_run: int = 0  # finished runs, including runs of an interrupted search
    num_new: int = 0  # paths tried in the rounds since the search was started or resumed
    total: float = 1.0  # estimated number of runs of the whole batch
    share: float = 0.0  # the largest share reported so far, so that the share never falls

    def count(self, num_runs: int, *, is_new: bool, is_round: bool) -> None:
        """Count the runs of a finished step.

        Args:
            num_runs: Their number.
            is_new: Whether they were run now.
            is_round: Whether each of them is a path that was tried for the first time.
        """
        self.num_run += num_runs
        if is_new and is_round:
            self.num_new += num_runs

    def report(self, step: str) -> None:
        """Report a finished step; `step` describes it in words."""
        if self.on_step is None:
            return
        self.share = max(self.share, self.num_run / self.total)
        self.on_step(self.share, self.num_new, step)

    def estimate_total(
        self, outcomes: Mapping[Pair, JudgedOutcome], unfinished: Collection[int]
    ) -> None:
        """Estimate the number of runs of the whole batch, after a round.

        The later steps are extrapolated: future paths need as many further runs, on average, as the
        paths so far.

        Args:
            outcomes: The outcomes of all paths so far.
            unfinished: Places of the questions that still try paths; none after the last round,
                when the number is exact.
        """
        if self.on_step is None:
            return
        num_paths = len(unfinished) * (self.num_simulations + 1)
        num_paths += sum(place not in unfinished for place, _ in outcomes)
        num_further_runs = 0
        for place, decisions in pairs_to_retest(outcomes):
            # Every question's full path is among its first paths. Until the rounds are over, it
            # would make the mean too large.
            is_full = decisions == full_decisions(len(decisions))
            if not unfinished or not is_full:
                num_further_runs += self.num_retests[place]
        if self.has_late_margins:
            num_further_runs += sum(outcome.is_right for outcome in outcomes.values())
        self.total = num_paths * (1 + num_further_runs / len(outcomes))


@dataclass
class PathCounter:
    """Counts the paths of a batch that are tried now, and passes its progress on.

    If the questions of the batch are searched one by one, each has a `BatchProgress` of its own.
    """

    on_step: OnStep | None
    num_new: int = 0  # paths tried since the search was started or resumed
    num_new_before: int = 0  # of these, the paths of attempts that are over

    def report(self, share: float, num_new: int, step: str) -> None:
        """Receive a finished step of the current attempt, and report it; see `OnStep`."""
        self.count(share, num_new, step)
        if self.on_step is not None:
            self.on_step(share, self.num_new, step)

    def count(self, _share: float, num_new: int, _step: str) -> None:
        """Receive a finished step of the current attempt."""
        self.num_new = self.num_new_before + num_new

    def begin_attempt(self) -> None:
        """Begin another attempt, whose paths are counted from 0."""
        self.num_new_before = self.num_new


@dataclass(frozen=True)
class BatchSteps:
    """Runs the steps of a batch, or reads their results if an interrupted search kept them."""

    questions: Sequence[SearchQuestion]
    store: ResultStore | None  # keeps the results; None keeps nothing
    progress: BatchProgress

    def run(
        self, name: str, pairs: Sequence[Pair], evaluate: Evaluate, *, is_round: bool = False
    ) -> list[JudgedOutcome]:
        """Return the outcomes of a step, from disk if they are there.

        The name, the questions and the pairs identify the outcomes on disk. `is_round` says that
        the step is a round.
        """
        if self.store is None:
            outcomes = evaluate(pairs)
            self.progress.count(len(pairs), is_new=True, is_round=is_round)
            return outcomes
        places = [question.place for question in self.questions]
        digest = hash_values([(places, list(pairs))])[:16]
        key = f"{name} {digest}"
        kept_steps = self.store.of(list[JudgedOutcome])
        kept_outcomes = kept_steps.get(key)
        if kept_outcomes is None:
            kept_outcomes = kept_steps.put(key, evaluate(pairs))
            self.progress.count(len(pairs), is_new=True, is_round=is_round)
        else:
            self.progress.count(len(pairs), is_new=False, is_round=is_round)
        return kept_outcomes

    def run_retest(
        self, name: str, pairs: Sequence[Pair], evaluate: Evaluate
    ) -> list[JudgedOutcome]:
        """Run a step of the re-test, and report it."""
        outcomes = self.run(name, pairs, evaluate)
        self.progress.report("re-testing")
        return outcomes
