"""The re-test: ask each question with other prompts, and keep the paths that are right again.

A pair is a question's place in the batch and the decisions of a path.
"""

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
"""A function that evaluates the pairs of a step, or reads the results of an interrupted search. Its
arguments are the step's name, the pairs, and the function that evaluates them."""

MARGIN_TOLERANCE = 0.5
"""How far a path's mean margin may lie below the full path's, in nats."""
MIN_PATHS_PER_PART = 64  # results are kept after each part; a part has whole questions


def is_candidate(decisions: Decisions, outcome: Outcome, full: Outcome) -> bool:
    """Tell whether a path may become its question's target.

    The path must be right. It must also be the full path, be shorter than the full path, or be
    right where the full path is wrong.
    """
    if not outcome.is_right:
        return False
    if not full.is_right:
        return True
    num_layers = len(decisions)
    return num_executions(decisions) < num_layers or decisions == full_decisions(num_layers)


def pairs_to_retest(outcomes: Mapping[Pair, Outcome]) -> list[Pair]:
    """Return the pairs to re-test, sorted by question: the full path, then the candidates.

    The margins of the candidates are compared with the full path's.
    """
    candidates = [pair for pair in outcomes if _is_candidate_pair(pair, outcomes)]
    pairs: dict[Pair, None] = {}  # an ordered set
    for place, decisions in candidates:
        pairs[place, full_decisions(len(decisions))] = None
        pairs[place, decisions] = None
    return sorted(pairs, key=lambda pair: pair[0])


def _is_candidate_pair(pair: Pair, outcomes: Mapping[Pair, Outcome]) -> bool:
    place, decisions = pair
    full = outcomes[place, full_decisions(len(decisions))]
    return is_candidate(decisions, outcomes[pair], full)


def evaluate_step(_name: str, pairs: Sequence[Pair], evaluate: Evaluate) -> list[Outcome]:
    """Evaluate the pairs of a step, without keeping the results."""
    return evaluate(pairs)


def retest_paths(
    evaluator: Evaluator,
    retest_prompts: Sequence[Sequence[TokenizedPrompt]],
    config: SearchConfig,
    outcomes: Mapping[Pair, Outcome],
    run_step: RunStep = evaluate_step,
) -> dict[Pair, Retest]:
    """Evaluate each candidate on the other prompts of its question; see `is_candidate`.

    Args:
        evaluator: The evaluator of the outcomes. Its states are freed before other prompts run.
        retest_prompts: For each question, its other prompts.
        config: The settings.
        outcomes: The outcome of each question and path, the full path of each question included.
        run_step: Evaluates the pairs of a few questions at a time, and may keep the results.

    Returns:
        The re-test of every candidate.

    Source: ours (docs/differences.md, D-05).
    """
    pairs = pairs_to_retest(outcomes)
    results: dict[Pair, list[Outcome]] = {pair: [] for pair in pairs}
    for number, prompts in enumerate(_group_prompts(pairs, retest_prompts)):
        runner = _new_runner(evaluator, prompts, config, outcomes)
        for part in _split_by_question([pair for pair in pairs if pair[0] in prompts]):
            part_outcomes = run_step(f"retest {number}", part, runner.evaluate)
            for pair, outcome in zip(part, part_outcomes, strict=True):
                results[pair].append(outcome)
    retests: dict[Pair, Retest] = {}
    for pair in pairs:
        if _is_candidate_pair(pair, outcomes):
            place, decisions = pair
            full_results = results[place, full_decisions(len(decisions))]
            retests[pair] = judge_retest(results[pair], full_results, MARGIN_TOLERANCE)
    return retests


def _group_prompts(
    pairs: Sequence[Pair], retest_prompts: Sequence[Sequence[TokenizedPrompt]]
) -> list[dict[int, TokenizedPrompt]]:
    """Group prompts by number: the first other prompt of each question, then the second, and so on.

    A group is a dictionary from the question's place to the prompt. Some questions have fewer
    prompts than others: a question with 3 options has fewer rotations.
    """
    places = list(dict.fromkeys(place for place, _ in pairs))
    num_groups = max((len(retest_prompts[place]) for place in places), default=0)
    groups: list[dict[int, TokenizedPrompt]] = []
    for number in range(num_groups):
        group: dict[int, TokenizedPrompt] = {}
        for place in places:
            if number < len(retest_prompts[place]):
                group[place] = retest_prompts[place][number]
        groups.append(group)
    return groups


def _split_by_question(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Split pairs into parts of whole questions; the pairs are sorted by question."""
    part: list[Pair] = []
    for pair in pairs:
        is_next_question = bool(part) and pair[0] != part[-1][0]
        if is_next_question and len(part) >= MIN_PATHS_PER_PART:
            yield part
            part = []
        part.append(pair)
    if part:
        yield part


def _new_runner(
    evaluator: Evaluator,
    prompts: Mapping[int, TokenizedPrompt],
    config: SearchConfig,
    outcomes: Mapping[Pair, Outcome],
) -> "NormalisedRetest | PromptRetest":
    """Return an object that evaluates paths on these prompts.

    If the prompts differ from the search's only in `normalised`, the log-probabilities of the
    search suffice. Otherwise the model runs.
    """
    if all(
        prompt.prompt == dataclasses.replace(evaluator.prompts[place].prompt, normalised=True)
        for place, prompt in prompts.items()
    ):
        return NormalisedRetest(prompts, outcomes)
    return PromptRetest(evaluator, prompts, config)


@dataclass(frozen=True)
class NormalisedRetest:
    """Judges options by their log-probability per character; no layer runs again."""

    prompts: Mapping[int, TokenizedPrompt]
    outcomes: Mapping[Pair, Outcome]  # outcomes of the search itself

    def evaluate(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Return the outcomes by the normalised log-probabilities."""
        return [
            judge_options(self.outcomes[pair].logprobs, self.prompts[pair[0]].prompt)
            for pair in pairs
        ]


@dataclass
class PromptRetest:
    """Runs paths on other prompts of the questions."""

    search_evaluator: Evaluator
    prompts: Mapping[int, TokenizedPrompt]  # by the question's place in the batch
    config: SearchConfig
    _evaluator: Evaluator | None = None

    def evaluate(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Return the outcomes on the other prompts, margins included."""
        if self._evaluator is None:  # made late: the results may all be on disk already
            self._evaluator = self._new_evaluator()
        # The new evaluator numbers only the questions of these prompts.
        new_places = {place: number for number, place in enumerate(self.prompts)}
        new_pairs = [(new_places[place], decisions) for place, decisions in pairs]
        return self._evaluator.with_margins(new_pairs, self._evaluator.evaluate(new_pairs))

    def _new_evaluator(self) -> Evaluator:
        self.search_evaluator.forget()
        return Evaluator(
            self.search_evaluator.routed,
            list(self.prompts.values()),
            self.config.state_cache_gb,
        )


def judge_retest(
    outcomes: Sequence[Outcome], full_outcomes: Sequence[Outcome], tolerance: float
) -> Retest:
    """Decide whether a path survives the re-test.

    A path survives if it is right on most of the other prompts, and if its mean margin is at most
    `tolerance` below the full path's. If a question has no other prompts, all its paths survive.

    Args:
        outcomes: The outcomes of the path, one per prompt.
        full_outcomes: The outcomes of the full path, in the same order.
        tolerance: How far the margin may lie below the full path's, in nats.
    """
    num_passed = sum(outcome.is_right for outcome in outcomes)
    # Margins are compared only on prompts where both paths have one.
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
