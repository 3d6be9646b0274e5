"""The re-test: right paths are asked again in other ways before they count as targets."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from drllm.config import SearchConfig
from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import Decisions, full_decisions, num_executions
from drllm.records.search import Retest
from drllm.search.evaluator import Evaluator, Outcome, TokenizedPrompt, judge_options

Evaluate: TypeAlias = Callable[[Sequence[Pair]], list[Outcome]]
RunStep: TypeAlias = Callable[[str, Sequence[Pair], Evaluate], list[Outcome]]
"""Evaluates the pairs of a named step, or returns what an earlier start of the search kept."""

MARGIN_TOLERANCE = 0.5
"""Nats that a path's mean margin may lie below the full path's."""
PATHS_AT_ONCE = 64  # asked again together, of whole questions: what an interruption loses at most


def is_candidate(decisions: Decisions, outcome: Outcome, full: Outcome) -> bool:
    """Whether a path may become its question's target.

    It must be right, and the full path itself, or shorter, or right where the full path is wrong.
    """
    if not outcome.is_right:
        return False
    if not full.is_right:
        return True
    num_layers = len(decisions)
    return num_executions(decisions) < num_layers or decisions == full_decisions(num_layers)


def pairs_to_retest(outcomes: Mapping[Pair, Outcome]) -> list[Pair]:
    """Return the pairs to ask again, by question: candidates, and the full path for its margin."""
    candidates = [pair for pair in outcomes if _is_candidate_pair(pair, outcomes)]
    pairs: dict[Pair, None] = {}  # an ordered set
    for place, decisions in candidates:
        pairs[place, full_decisions(len(decisions))] = None
    for pair in candidates:
        pairs[pair] = None
    return sorted(pairs, key=lambda pair: pair[0])


def _is_candidate_pair(pair: Pair, outcomes: Mapping[Pair, Outcome]) -> bool:
    place, decisions = pair
    full = outcomes[place, full_decisions(len(decisions))]
    return is_candidate(decisions, outcomes[pair], full)


def evaluate_step(_name: str, pairs: Sequence[Pair], evaluate: Evaluate) -> list[Outcome]:
    """Evaluate the pairs of a step and keep nothing."""
    return evaluate(pairs)


def retest_paths(
    evaluator: Evaluator,
    retest_prompts: Sequence[Sequence[TokenizedPrompt]],
    config: SearchConfig,
    outcomes: Mapping[Pair, Outcome],
    run_step: RunStep = evaluate_step,
) -> dict[Pair, Retest]:
    """Ask every question again in its other ways, along every path that may be its target.

    Args:
        evaluator: The one that made the outcomes. Its states are freed when other prompts run.
        retest_prompts: For each question, its other ways of asking.
        config: The settings.
        outcomes: By question and path; the full path of each question is among them.
        run_step: Evaluates a few questions' pairs at a time, and may keep the results.

    Returns:
        The re-test of every candidate.

    Source: ours (docs/differences.md, D-05).
    """
    pairs = pairs_to_retest(outcomes)
    results: dict[Pair, list[Outcome]] = {pair: [] for pair in pairs}
    for number, prompts in enumerate(_ways_of_asking(pairs, retest_prompts)):
        way = _way_of_asking(evaluator, prompts, config, outcomes)
        for part in _split_by_question([pair for pair in pairs if pair[0] in prompts]):
            part_outcomes = run_step(f"retest {number}", part, way.evaluate)
            for pair, outcome in zip(part, part_outcomes, strict=True):
                results[pair].append(outcome)
    retests: dict[Pair, Retest] = {}
    for pair in pairs:
        if _is_candidate_pair(pair, outcomes):
            place, decisions = pair
            full_results = results[place, full_decisions(len(decisions))]
            retests[pair] = judge_retest(results[pair], full_results, MARGIN_TOLERANCE)
    return retests


def _ways_of_asking(
    pairs: Sequence[Pair], retest_prompts: Sequence[Sequence[TokenizedPrompt]]
) -> list[dict[int, TokenizedPrompt]]:
    """Return, for each way of asking, the prompts of the questions that have it, by place.

    Questions may have different numbers of ways: one with 3 options has fewer rotations.
    """
    places = list(dict.fromkeys(place for place, _ in pairs))
    num_ways = max((len(retest_prompts[place]) for place in places), default=0)
    ways: list[dict[int, TokenizedPrompt]] = []
    for number in range(num_ways):
        having = [place for place in places if number < len(retest_prompts[place])]
        ways.append({place: retest_prompts[place][number] for place in having})
    return ways


def _split_by_question(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Split pairs, which come by question, into parts of whole questions."""
    part: list[Pair] = []
    for pair in pairs:
        is_next_question = bool(part) and pair[0] != part[-1][0]
        if is_next_question and len(part) >= PATHS_AT_ONCE:
            yield part
            part = []
        part.append(pair)
    if part:
        yield part


def _way_of_asking(
    evaluator: Evaluator,
    prompts: Mapping[int, TokenizedPrompt],
    config: SearchConfig,
    outcomes: Mapping[Pair, Outcome],
) -> "NormalisedRetest | PromptRetest":
    """Return how to evaluate one way: anew, or from the log-probabilities that are there."""
    for place, prompt in prompts.items():
        by_character = dataclasses.replace(evaluator.prompts[place].prompt, normalised=True)
        if prompt.prompt != by_character:
            return PromptRetest(evaluator, prompts, config)
    return NormalisedRetest(prompts, outcomes)


@dataclass(frozen=True)
class NormalisedRetest:
    """Judges options by character: the log-probabilities are known, and no layer runs again."""

    prompts: Mapping[int, TokenizedPrompt]
    outcomes: Mapping[Pair, Outcome]  # of the first way of asking

    def evaluate(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Return the outcomes by the normalised log-probabilities."""
        return [
            judge_options(self.outcomes[pair].logprobs, self.prompts[pair[0]].prompt)
            for pair in pairs
        ]


@dataclass
class PromptRetest:
    """Runs paths on other prompts of the questions."""

    first: Evaluator
    prompts: Mapping[int, TokenizedPrompt]  # by the question's place in the batch
    config: SearchConfig
    _evaluator: Evaluator | None = None

    def evaluate(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Return the outcomes on the other prompts, margins included."""
        if self._evaluator is None:  # nothing runs where an earlier start kept all results
            self._evaluator = self._new_evaluator()
        # In the new evaluator only these questions have rows.
        row_of = {place: row for row, place in enumerate(self.prompts)}
        rows = [(row_of[place], decisions) for place, decisions in pairs]
        return self._evaluator.with_margins(rows, self._evaluator.evaluate(rows))

    def _new_evaluator(self) -> Evaluator:
        self.first.forget()
        return Evaluator(
            self.first.routed,
            list(self.prompts.values()),
            self.config.state_cache_gb,
        )


def judge_retest(
    outcomes: Sequence[Outcome], full_outcomes: Sequence[Outcome], tolerance: float
) -> Retest:
    """Decide whether a path survives the re-test.

    It must be right in most ways of asking, and its mean margin at most `tolerance` nats below the
    full path's. Without other ways of asking it survives.

    Args:
        outcomes: The path's, one for each way of asking.
        full_outcomes: The full path's, in the same order.
        tolerance: In nats.
    """
    num_passed = sum(outcome.is_right for outcome in outcomes)
    # Margins are compared only over the ways in which both paths have one.
    margins: list[float] = []
    losses: list[float] = []
    for outcome, full in zip(outcomes, full_outcomes, strict=True):
        if outcome.margin is not None and full.margin is not None:
            margins.append(outcome.margin)
            losses.append(full.margin - outcome.margin)
    mean_margin = None
    mean_loss = 0.0
    if margins:
        mean_margin = sum(margins) / len(margins)
        mean_loss = sum(losses) / len(losses)
    is_right = num_passed * 2 > len(outcomes) or not outcomes
    return Retest(
        passed=num_passed,
        asked=len(outcomes),
        margin=mean_margin,
        survived=is_right and mean_loss <= tolerance,
    )
