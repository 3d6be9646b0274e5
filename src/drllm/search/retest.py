"""The re-test: right paths are asked again in other ways before they count as targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from drllm.config import SearchConfig
from drllm.cost import executions
from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import Decisions, full_decisions
from drllm.records import Retest
from drllm.search.evaluator import Evaluator, Outcome, Reading

Once: TypeAlias = Callable[[str, Sequence[Pair], Callable[[], list[Outcome]]], list[Outcome]]
"""Returns what an earlier start of the search kept of a step, by its name and pairs, or does it."""


def candidates(paths: Mapping[Decisions, Outcome]) -> list[Decisions]:
    """Return a question's paths that may become its target, in the order tried.

    They are the right paths that improve on the full path or are shorter, and the full path itself
    where it is right.
    """
    full = full_decisions(len(next(iter(paths))))
    return [
        decisions
        for decisions, outcome in paths.items()
        if outcome.reward >= 1
        and (
            paths[full].reward < 1 or decisions == full or executions(decisions) < executions(full)
        )
    ]


def retested(
    first: Evaluator,
    others: Sequence[Sequence[Reading]],
    config: SearchConfig,
    found: Sequence[Mapping[Decisions, Outcome]],
    once: Once | None = None,
) -> dict[Pair, Retest]:
    """Ask every question again in other ways, with every path that may be a target.

    The full path is asked in any case: margins are compared with its own.

    Args:
        first: The evaluator of the first asking; its states are given up where other prompts
            need the memory.
        others: By question, the other ways of asking it.
        config: Settings of the search.
        found: By question, each path's outcome in the first asking.
        once: Keeps what is evaluated.

    Returns:
        The outcome by question's place and decisions, of candidates only.

    Source: ours (docs/differences.md, D-05).
    """
    routed = first.routed
    full = full_decisions(routed.num_layers)
    chosen = [(place, path) for place, paths in enumerate(found) for path in candidates(paths)]
    places = sorted({place for place, _ in chosen})
    pairs = [*dict.fromkeys([*((place, full) for place in places), *chosen])]
    results: dict[Pair, list[Outcome]] = {pair: [] for pair in pairs}
    ways = []
    for way in range(max((len(others[place]) for place in places), default=0)):
        # Questions may have different numbers of ways: one with 3 options has fewer rotations.
        asked = {place: others[place][way] for place in places if way < len(others[place])}
        reads_anew = not all(
            first.readings[place].reads_like(reading.prompt) for place, reading in asked.items()
        )
        ways.append((reads_anew, way, asked))
    # What reads as at first needs the states that are held; they can go before other states come.
    for reads_anew, way, asked in sorted(ways, key=lambda each: each[0]):
        part = [pair for pair in pairs if pair[0] in asked]

        def evaluate(
            reads_anew: bool = reads_anew,
            asked: Mapping[int, Reading] = asked,
            part: Sequence[Pair] = part,
        ) -> list[Outcome]:
            if reads_anew:
                first.forget()
                rows = {place: row for row, place in enumerate(asked)}
                evaluator = Evaluator(
                    routed,
                    list(asked.values()),
                    config.state_cache_gb,
                    paths_per_pass=config.paths_per_pass,
                )
                pairs = [(rows[place], decisions) for place, decisions in part]
            else:
                prompts = [reading.prompt for reading in first.readings]
                for place, reading in asked.items():
                    prompts[place] = reading.prompt
                evaluator, pairs = first.judged_as(prompts), list(part)
            return evaluator.with_margins(pairs, evaluator.evaluate(pairs))

        outcomes = evaluate() if once is None else once(f"retest {way}", part, evaluate)
        for pair, outcome in zip(part, outcomes, strict=True):
            results[pair].append(outcome)
    return {
        (place, path): judge(results[place, path], results[place, full], config.margin_tolerance)
        for place, path in chosen
    }


def judge(outcomes: Sequence[Outcome], full: Sequence[Outcome], tolerance: float) -> Retest:
    """Say whether a path has survived.

    Args:
        outcomes: Of the path, one per way of asking.
        full: Of the full path, in the same order.
        tolerance: Nats by which the path's mean margin may lie below the full path's.
    """
    passed = sum(outcome.reward >= 1 for outcome in outcomes)
    # Margins are compared only over the ways in which both paths have one.
    both = [
        (mine.margin, theirs.margin)
        for mine, theirs in zip(outcomes, full, strict=True)
        if mine.margin is not None and theirs.margin is not None
    ]
    mine = sum(m for m, _ in both) / len(both) if both else None
    lost = sum(f - m for m, f in both) / len(both) if both else 0.0
    return Retest(
        passed=passed,
        asked=len(outcomes),
        margin=mine,
        survived=passed * 2 > len(outcomes) and lost <= tolerance,
    )
