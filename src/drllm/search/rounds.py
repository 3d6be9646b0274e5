"""Rounds over many questions: each round evaluates new paths of all questions in one batch.

The strategy of each question says which paths come next (`strategies`), and the evaluator runs them
(`evaluator`). This module brings both together.
"""

import itertools
from collections.abc import Sequence
from functools import partial

from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import Decisions
from drllm.search.evaluator import Evaluator, JudgedOutcome
from drllm.search.steps import BatchSteps, OnFirstRound
from drllm.search.strategies import Evaluation, PathSearch, path_score


def run_rounds(
    searches: Sequence[PathSearch],
    evaluator: Evaluator,
    steps: BatchSteps,
    on_first_round: OnFirstRound | None = None,
) -> dict[Pair, JudgedOutcome]:
    """Evaluate new paths of all questions, round by round, until every search is over.

    Args:
        searches: The search of each question.
        evaluator: Evaluates paths on these questions.
        steps: Runs each round, or reads what an interrupted search kept of it.
        on_first_round: Called after the first round; None calls nothing.

    Returns:
        The outcome of every path, by question; the paths of a question stay in the order in which
        they ran.
    """
    outcomes: dict[Pair, JudgedOutcome] = {}
    paths = [search.start() for search in searches]  # of each question; none once it is over
    for number in itertools.count():
        pairs = _list_pairs(paths)
        if not pairs:
            break
        evaluate = partial(_evaluate_new, evaluator)
        round_outcomes = steps.run(f"round {number}", pairs, evaluate, is_round=True)
        outcomes.update(zip(pairs, round_outcomes, strict=True))
        if number == 0 and on_first_round is not None:
            on_first_round(steps.questions, outcomes)
        for place, search in enumerate(searches):
            if paths[place]:
                evaluations = [
                    _judge_path(outcomes[place, decisions], evaluator) for decisions in paths[place]
                ]
                paths[place] = search.advance(evaluations)
        unfinished = {place for place, next_paths in enumerate(paths) if next_paths}
        steps.progress.estimate_total(outcomes, unfinished)
        steps.progress.report("trying paths")
    pairs = sorted(outcomes, key=lambda pair: pair[0])
    return {pair: outcomes[pair] for pair in pairs}


def _list_pairs(paths: Sequence[Sequence[Decisions]]) -> list[Pair]:
    """List the paths of all questions, each with the place of its question."""
    pairs: list[Pair] = []
    for place, question_paths in enumerate(paths):
        pairs += [(place, decisions) for decisions in question_paths]
    return pairs


def _evaluate_new(evaluator: Evaluator, pairs: Sequence[Pair]) -> list[JudgedOutcome]:
    """Evaluate paths, and add the margins that no later path can change."""
    return evaluator.with_margins(pairs, evaluator.evaluate(pairs), wrong_only=True)


def _judge_path(outcome: JudgedOutcome, evaluator: Evaluator) -> Evaluation:
    """Return what the strategy learns of an outcome."""
    margin = None
    if evaluator.scores_options:  # right generated answers get their margins later
        margin = outcome.margin
    return Evaluation(outcome.reward, path_score(margin, outcome.kl))


def add_late_margins(
    evaluator: Evaluator, outcomes: dict[Pair, JudgedOutcome], steps: BatchSteps
) -> dict[Pair, JudgedOutcome]:
    """Add the margins of right generated answers, now that all wrong answers are known."""
    if evaluator.scores_options:
        return outcomes

    def add_margins(right_pairs: Sequence[Pair]) -> list[JudgedOutcome]:
        completed_outcomes = evaluator.with_margins(list(outcomes), list(outcomes.values()))
        by_pair = dict(zip(outcomes, completed_outcomes, strict=True))
        return [by_pair[pair] for pair in right_pairs]

    right_pairs = [pair for pair, outcome in outcomes.items() if outcome.is_right]
    right_outcomes = steps.run("late margins", right_pairs, add_margins)
    steps.progress.report("scoring answers")
    return {**outcomes, **dict(zip(right_pairs, right_outcomes, strict=True))}
