"""The re-test: right paths are asked again in other ways before they count as targets."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TypeAlias

from drllm.config import SearchConfig
from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import Decisions, full_decisions, num_executions
from drllm.records.search import Retest
from drllm.search.evaluator import Evaluator, Outcome, Reading, outcome_of

Once: TypeAlias = Callable[[str, Sequence[Pair], Callable[[], list[Outcome]]], list[Outcome]]
"""Returns what an earlier start of the search kept of a step, by its name and pairs, or does it."""

PATHS_AT_ONCE = 64  # asked again together, of whole questions: what an interruption loses at most


def is_candidate(decisions: Decisions, outcome: Outcome, full: Outcome) -> bool:
    """Say whether a path may become its question's target, by its and the full path's outcome.

    It is right, and improves on the full path, or is shorter, or is the full path itself.
    """
    if outcome.reward < 1:
        return False
    is_shorter = num_executions(decisions) < len(decisions)
    return full.reward < 1 or is_shorter or decisions == full_decisions(len(decisions))


def to_retest(found: Mapping[Pair, Outcome]) -> list[Pair]:
    """Return what is asked again, by question: candidates and, for its margin, the full path."""
    full = {place: path for place, path in found if set(path) == {1}}
    chosen = [
        (place, path)
        for (place, path), outcome in found.items()
        if is_candidate(path, outcome, found[place, full[place]])
    ]
    first = dict.fromkeys((place, full[place]) for place, _ in chosen)
    return sorted({**first, **dict.fromkeys(chosen)}, key=lambda pair: pair[0])


def retested(
    first: Evaluator,
    others: Sequence[Sequence[Reading]],
    config: SearchConfig,
    found: Mapping[Pair, Outcome],
    once: Once = lambda _, __, evaluate: evaluate(),
) -> dict[Pair, Retest]:
    """Ask every question again in `others`, its other ways, with every path that may be a target.

    The evaluator of the first asking, which found the outcomes, gives its states up where other
    prompts need the memory. What is evaluated is kept by `once`, a few questions at a time.

    Source: ours (docs/differences.md, D-05).
    """
    full, pairs = full_decisions(first.routed.num_layers), to_retest(found)
    results: dict[Pair, list[Outcome]] = {pair: [] for pair in pairs}
    places = list(dict.fromkeys(place for place, _ in pairs))
    # Questions may have different numbers of ways: one with 3 options has fewer rotations.
    ways = [
        {place: others[place][way] for place in places if way < len(others[place])}
        for way in range(max((len(others[place]) for place in places), default=0))
    ]
    for way, asked in enumerate(ways):
        ask = _asking(first, asked, config, found)
        for part in _parts([pair for pair in pairs if pair[0] in asked]):
            outcomes = once(f"retest {way}", part, partial(ask, part))
            for pair, outcome in zip(part, outcomes, strict=True):
                results[pair].append(outcome)
    return {
        (place, path): judge(results[place, path], results[place, full], config.margin_tolerance)
        for place, path in pairs
        if is_candidate(path, found[place, path], found[place, full])
    }


def _parts(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Divide pairs, which come by question, so that no question's are divided."""
    part: list[Pair] = []
    for _, of_question in itertools.groupby(pairs, key=lambda pair: pair[0]):
        part += of_question
        if len(part) >= PATHS_AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def _asking(
    first: Evaluator,
    asked: Mapping[int, Reading],
    config: SearchConfig,
    found: Mapping[Pair, Outcome],
) -> Callable[[Sequence[Pair]], list[Outcome]]:
    """Return what asks in one way; options that are only judged by character run nothing again."""
    if all(
        reading.prompt == dataclasses.replace(first.readings[place].prompt, normalised=True)
        for place, reading in asked.items()
    ):
        return lambda pairs: [
            outcome_of(found[place, path].logprobs, asked[place].prompt) for place, path in pairs
        ]
    # In the new evaluator the questions that are asked are all there are.
    rows = {place: row for row, place in enumerate(asked)}

    @cache
    def evaluator() -> Evaluator:  # only made where something isn't kept already
        first.forget()
        size, memory = config.paths_per_pass, config.state_cache_gb
        return Evaluator(first.routed, [*asked.values()], memory, paths_per_pass=size)

    def ask(pairs: Sequence[Pair]) -> list[Outcome]:
        asking = [(rows[place], path) for place, path in pairs]
        return evaluator().with_margins(asking, evaluator().evaluate(asking))

    return ask


def judge(outcomes: Sequence[Outcome], full: Sequence[Outcome], tolerance: float) -> Retest:
    """Say whether a path has survived, by its outcomes and the full path's, one a way of asking.

    Its mean margin may lie below the full path's by `tolerance` nats. Where there is no other way
    of asking, it has.
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
        survived=(passed * 2 > len(outcomes) or not outcomes) and lost <= tolerance,
    )
