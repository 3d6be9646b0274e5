"""The re-test: run right paths on other prompts of their questions.

A path may be right by chance, for example because it prefers the first option. Only a path that is
right on other prompts too survives, and may become a target.

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
from drllm.search.evaluator import Evaluator, JudgedOutcome, TokenizedPrompt, judge_options

Evaluate: TypeAlias = Callable[[Sequence[Pair]], list[JudgedOutcome]]
"""A function that runs pairs and returns their outcomes, in order."""
RunStep: TypeAlias = Callable[[str, Sequence[Pair], Evaluate], list[JudgedOutcome]]
"""A function that returns the outcomes of one step of the re-test.

Its arguments are the step's name, the step's pairs, and the function that evaluates them. It may
keep the outcomes on disk, and read them there when a search is resumed."""

MARGIN_TOLERANCE = 0.5
"""How far a path's mean margin may lie below the full path's, in nats."""
MIN_PATHS_PER_PART = 64
"""Minimum number of paths in a step of the re-test, unless no more are left."""


def is_candidate(decisions: Decisions, outcome: JudgedOutcome, full: JudgedOutcome) -> bool:
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


def pairs_to_retest(outcomes: Mapping[Pair, JudgedOutcome]) -> list[Pair]:
    """Return the pairs to re-test, sorted by question.

    Of each question with candidates, the full path comes first, since the candidates' margins are
    compared with its margin. The candidates follow.
    """
    pairs: dict[Pair, None] = {}  # a dictionary used as a set that keeps its order
    for pair in _list_candidates(outcomes):
        pairs[_find_full_pair(pair)] = None
        pairs[pair] = None
    return sorted(pairs, key=lambda pair: pair[0])


def _list_candidates(outcomes: Mapping[Pair, JudgedOutcome]) -> list[Pair]:
    """Return the pairs whose path may become a target."""
    candidates: list[Pair] = []
    for pair, outcome in outcomes.items():
        _, decisions = pair
        full_outcome = outcomes[_find_full_pair(pair)]
        if is_candidate(decisions, outcome, full_outcome):
            candidates.append(pair)
    return candidates


def _find_full_pair(pair: Pair) -> Pair:
    """Return the pair of the same question with the full path."""
    place, decisions = pair
    return place, full_decisions(len(decisions))


def evaluate_step(_name: str, pairs: Sequence[Pair], evaluate: Evaluate) -> list[JudgedOutcome]:
    """Evaluate the pairs of a step: the `RunStep` that keeps nothing on disk."""
    return evaluate(pairs)


def retest_paths(
    evaluator: Evaluator,
    retest_prompts: Sequence[Sequence[TokenizedPrompt]],
    config: SearchConfig,
    outcomes: Mapping[Pair, JudgedOutcome],
    run_step: RunStep = evaluate_step,
) -> dict[Pair, Retest]:
    """Run each candidate on the other prompts of its question, and judge the results.

    `is_candidate` says what a candidate is.

    Args:
        evaluator: The evaluator of the search. Its states are freed before other prompts run.
        retest_prompts: For each question, its other prompts.
        config: The settings.
        outcomes: The outcomes of the search for all pairs, with the full path of each question.
        run_step: Evaluates the pairs of a few questions at a time, and may keep the outcomes.

    Returns:
        The re-test of every candidate.

    Source: ours (docs/differences.md, D-05).
    """
    pairs = pairs_to_retest(outcomes)
    results: dict[Pair, list[JudgedOutcome]] = {pair: [] for pair in pairs}
    for number, prompts in enumerate(_group_prompts(pairs, retest_prompts)):
        runner = _new_runner(evaluator, prompts, config, outcomes)
        pairs_with_prompt = [pair for pair in pairs if pair[0] in prompts]
        for part in _split_by_question(pairs_with_prompt):
            part_outcomes = run_step(f"retest {number}", part, runner.evaluate)
            for pair, outcome in zip(part, part_outcomes, strict=True):
                results[pair].append(outcome)
    retests: dict[Pair, Retest] = {}
    for pair in _list_candidates(outcomes):
        full_results = results[_find_full_pair(pair)]
        retests[pair] = judge_retest(results[pair], full_results, MARGIN_TOLERANCE)
    return retests


def _group_prompts(
    pairs: Sequence[Pair], retest_prompts: Sequence[Sequence[TokenizedPrompt]]
) -> list[dict[int, TokenizedPrompt]]:
    """Group the other prompts: the first of every question, then the second, and so on.

    A group maps the places of questions to prompts. Later groups may lack questions that have fewer
    prompts: each prompt shows the options in another order, and a question may have few options.
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
    """Split pairs into parts for `RunStep`; all pairs of a question are in the same part.

    The pairs are sorted by question.
    """
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
    outcomes: Mapping[Pair, JudgedOutcome],
) -> "NormalisedRetest | PromptRetest":
    """Return an object whose method `evaluate` gives the outcomes of paths on these prompts.

    Some other prompts are the same text, but score options per character (`Prompt.normalised`).
    For these the log-probabilities of the search suffice. For other texts the model runs.
    """
    for place, prompt in prompts.items():
        search_prompt = evaluator.prompts[place].prompt
        if prompt.prompt != dataclasses.replace(search_prompt, normalised=True):
            return PromptRetest(evaluator, prompts, config)
    return NormalisedRetest(prompts, outcomes)


@dataclass(frozen=True)
class NormalisedRetest:
    """Judges options by their log-probability per character; no layer runs again."""

    prompts: Mapping[int, TokenizedPrompt]  # by the question's place in the batch
    outcomes: Mapping[Pair, JudgedOutcome]  # the outcomes of the search

    def evaluate(self, pairs: Sequence[Pair]) -> list[JudgedOutcome]:
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
    _evaluator: Evaluator | None = None  # made by the first `evaluate`

    def evaluate(self, pairs: Sequence[Pair]) -> list[JudgedOutcome]:
        """Return the outcomes on the other prompts, margins included."""
        if self._evaluator is None:  # not made earlier, since all outcomes may be on disk
            self._evaluator = self._new_evaluator()
        # In the new evaluator, a question's place is the place of its prompt in `prompts`.
        new_places = {place: number for number, place in enumerate(self.prompts)}
        new_pairs = [(new_places[place], decisions) for place, decisions in pairs]
        outcomes = self._evaluator.evaluate(new_pairs)
        return self._evaluator.with_margins(new_pairs, outcomes)

    def _new_evaluator(self) -> Evaluator:
        self.search_evaluator.forget()
        return Evaluator(
            self.search_evaluator.routed,
            list(self.prompts.values()),
            self.config.state_cache_gb,
        )


def judge_retest(
    outcomes: Sequence[JudgedOutcome], full_outcomes: Sequence[JudgedOutcome], tolerance: float
) -> Retest:
    """Decide whether a path survives the re-test.

    A path survives if it is right on more than half of the other prompts, and if its mean margin is
    at most `tolerance` below the full path's. If a question has no other prompts, all its paths
    survive.

    Args:
        outcomes: The outcomes of the path on the other prompts.
        full_outcomes: The outcomes of the full path, in the same order.
        tolerance: How far the mean margin may lie below the full path's, in nats.
    """
    num_passed = sum(outcome.is_right for outcome in outcomes)
    # Margins are compared only on prompts on which both paths have a margin.
    margins: list[float] = []
    shortfalls: list[float] = []
    for outcome, full_outcome in zip(outcomes, full_outcomes, strict=True):
        if outcome.margin is not None and full_outcome.margin is not None:
            margins.append(outcome.margin)
            shortfalls.append(full_outcome.margin - outcome.margin)
    mean_margin = None
    mean_shortfall = 0.0
    if margins:
        mean_margin = sum(margins) / len(margins)
        mean_shortfall = sum(shortfalls) / len(shortfalls)
    has_passed = not outcomes or num_passed > len(outcomes) / 2
    return Retest(
        passed=num_passed,
        asked=len(outcomes),
        margin=mean_margin,
        survived=has_passed and mean_shortfall <= tolerance,
    )
