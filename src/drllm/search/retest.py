"""The re-test: right paths are asked again in other ways before they count as targets.

Owns which paths are candidates, in what order the other ways are asked, and when a path has
survived. Leaves the other ways themselves to the tasks, and what a path is worth in each of them to
`evaluator`.
"""

from __future__ import annotations

from collections.abc import Sequence

from drllm.config import SearchConfig
from drllm.cost import executions
from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import Decisions, full_decisions
from drllm.records import Retest
from drllm.search.evaluator import BlockEvaluator, Outcome
from drllm.tasks.base import Example, Task


def retested(
    asked_first: BlockEvaluator,
    examples: Sequence[Example],
    task: Task,
    config: SearchConfig,
    found: Sequence[dict[Decisions, Outcome]],
) -> dict[Pair, Retest]:
    """Ask every question again in the task's other ways, under every path that may be a target.

    Candidates are the right paths that improve on the full path or are shorter, and the full path
    itself where it is right. The full path's margins are needed in any case, to compare with.

    Args:
        asked_first: The evaluator of the first asking; its states are given up where other prompts
            need the memory.
        examples: The questions of the block.
        task: The task that they belong to.
        config: Settings of the search.
        found: By question, each path's outcome in the first asking.

    Returns:
        The outcome by question's place and decisions, of candidates only.

    Source: ours (docs/differences.md, D-05).
    """
    routed = asked_first.routed
    reward = asked_first.prompts[0].reward
    full = full_decisions(routed.num_layers)
    candidates = [
        (place, decisions)
        for place, paths in enumerate(found)
        for decisions, outcome in paths.items()
        if outcome.reward >= 1
        and (
            paths[full].reward < 1 or decisions == full or executions(decisions) < executions(full)
        )
    ]
    if not candidates:
        return {}
    places = sorted({place for place, _ in candidates})
    pairs = [*dict.fromkeys([*((place, full) for place in places), *candidates])]
    asked = {place: task.retests(examples[place], reward) for place in places}
    results: dict[Pair, list[Outcome]] = {pair: [] for pair in pairs}
    ways = []
    for way in range(max(len(prompts) for prompts in asked.values())):
        # Questions may have different numbers of ways: one with 3 options has fewer rotations.
        here = [place for place in places if way < len(asked[place])]
        as_first = list(asked_first.prompts)
        for place in here:
            as_first[place] = asked[place][way]
        ways.append((not asked_first.reads_the_same(as_first), here, as_first))
    # What reads as at first needs the states that are held; they can go before other states come.
    for reads_anew, here, prompts in sorted(ways, key=lambda way: way[0]):
        part = [pair for pair in pairs if pair[0] in here]
        if reads_anew:
            asked_first.forget()
            evaluator = BlockEvaluator(
                routed,
                [prompts[place] for place in here],
                config.state_cache_gb,
                paths_per_pass=config.paths_per_pass,
            )
            asking = [(here.index(place), decisions) for place, decisions in part]
        else:
            evaluator, asking = asked_first.judged_as(prompts), part
        outcomes = evaluator.with_margins(asking, evaluator.evaluate(asking))
        for pair, outcome in zip(part, outcomes, strict=True):
            results[pair].append(outcome)
    return {
        pair: judge(results[pair], results[pair[0], full], config.margin_tolerance)
        for pair in candidates
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
