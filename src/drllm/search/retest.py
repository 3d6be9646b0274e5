"""The re-test: right paths are asked again in other ways before they count as targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

from drllm.config import SearchConfig
from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import Decisions, full_decisions, num_executions
from drllm.records import Retest
from drllm.search.evaluator import Evaluator, Outcome, Reading

Once: TypeAlias = Callable[[str, Sequence[Pair], Callable[[], list[Outcome]]], list[Outcome]]
"""Returns what an earlier start of the search kept of a step, by its name and pairs, or does it."""


def is_candidate(decisions: Decisions, outcome: Outcome, full: Outcome) -> bool:
    """Say whether a path may become its question's target, by its and the full path's outcome.

    It is right, and improves on the full path, or is shorter, or is the full path itself.
    """
    if outcome.reward < 1:
        return False
    is_shorter = num_executions(decisions) < len(decisions)
    return full.reward < 1 or is_shorter or decisions == full_decisions(len(decisions))


def retested(
    first: Evaluator,
    others: Sequence[Sequence[Reading]],
    config: SearchConfig,
    found: Mapping[Pair, Outcome],
    once: Once = lambda _, __, evaluate: evaluate(),
) -> dict[Pair, Retest]:
    """Ask every question again in other ways, with every path that may be a target.

    The full path is asked in any case: margins are compared with its own.

    Args:
        first: The evaluator of the first asking; its states are given up where other prompts
            need the memory.
        others: By question, the other ways of asking it.
        config: Settings of the search.
        found: The outcomes of the first asking, by question's place and decisions.
        once: Keeps what is evaluated.

    Source: ours (docs/differences.md, D-05).
    """
    full = full_decisions(first.routed.num_layers)
    chosen = [pair for pair in found if is_candidate(pair[1], found[pair], found[pair[0], full])]
    places = sorted({place for place, _ in chosen})
    pairs = [*dict.fromkeys([*((place, full) for place in places), *chosen])]
    results: dict[Pair, list[Outcome]] = {pair: [] for pair in pairs}
    # Questions may have different numbers of ways: one with 3 options has fewer rotations.
    ways = [
        {place: others[place][way] for place in places if way < len(others[place])}
        for way in range(max((len(others[place]) for place in places), default=0))
    ]
    anew = [
        not all(first.readings[place].reads_like(asked[place].prompt) for place in asked)
        for asked in ways
    ]
    # What reads as at first needs the states that are held; they can go before other states come.
    for way in sorted(range(len(ways)), key=anew.__getitem__):
        part = [pair for pair in pairs if pair[0] in ways[way]]
        ask = partial(_ask, first, ways[way], part, config, anew[way])
        outcomes = once(f"retest {way}", part, ask)
        for pair, outcome in zip(part, outcomes, strict=True):
            results[pair].append(outcome)
    return {
        (place, path): judge(results[place, path], results[place, full], config.margin_tolerance)
        for place, path in chosen
    }


def _ask(
    first: Evaluator,
    asked: Mapping[int, Reading],
    pairs: Sequence[Pair],
    config: SearchConfig,
    is_new: bool,
) -> list[Outcome]:
    """Ask in one way; where that reads as at first, the states that are held are judged anew."""
    if is_new:
        first.forget()
        readings, size = [*asked.values()], config.paths_per_pass
        evaluator = Evaluator(first.routed, readings, config.state_cache_gb, paths_per_pass=size)
        rows = {place: row for row, place in enumerate(asked)}
        pairs = [(rows[place], decisions) for place, decisions in pairs]
    else:
        evaluator = first.judged_as(
            [asked.get(place, reading).prompt for place, reading in enumerate(first.readings)]
        )
    return evaluator.with_margins(pairs, evaluator.evaluate(pairs))


def judge(outcomes: Sequence[Outcome], full: Sequence[Outcome], tolerance: float) -> Retest:
    """Say whether a path has survived, by its outcomes and the full path's, one a way of asking.

    Its mean margin may lie below the full path's by `tolerance` nats.
    """
    passed = sum(outcome.reward >= 1 for outcome in outcomes)
    # Margins are compared only over the ways in which both paths have one.
    both = [
        (mine.margin, theirs.margin)
        for mine, theirs in zip(outcomes, full, strict=True)
        if mine.margin is not None and theirs.margin is not None
    ]
    lost = sum(f - m for m, f in both) / len(both) if both else 0.0
    return Retest(
        passed=passed,
        asked=len(outcomes),
        margin=sum(m for m, _ in both) / len(both) if both else None,
        survived=passed * 2 > len(outcomes) and lost <= tolerance,
    )
