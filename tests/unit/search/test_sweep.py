from collections.abc import Callable
from random import Random

from drllm.config import SearchConfig
from drllm.paths import Decisions, full_decisions, num_executions
from drllm.search.actions import apply, legal_actions
from drllm.search.strategies.sweep import SweepSearch

NUM_SINGLE = 6 + 5 + 6
"""Edits of a full path of 6 layers: single skips, double skips, repeats."""


def sweep(
    reward: Callable[[Decisions], float] = lambda decisions: 0.0,
    num_layers: int = 6,
    seed: int = 0,
    **settings: object,
) -> SweepSearch:
    config = SearchConfig(strategy="sweep", **settings)
    search = SweepSearch(num_layers, config, Random(seed))
    while asked := search.ask():
        search.tell(*asked, reward(*asked))
    return search


def levels(search: SweepSearch) -> list[Decisions]:
    """Every path tried but the full one, in order."""
    return [*search.tried][1:]


def neighbours(decisions: Decisions) -> set[Decisions]:
    return {apply(decisions, action) for action in legal_actions(decisions, 12)}


def test_the_first_level_is_every_edit_once_single_skips_then_double_ones_then_repeats():
    first = levels(sweep(num_simulations=NUM_SINGLE))
    assert len(first) == NUM_SINGLE
    assert set(first) == neighbours(full_decisions(6))
    assert [num_executions(decisions) for decisions in first] == [5] * 6 + [4] * 5 + [7] * 6


def test_the_order_within_a_kind_is_drawn_with_the_seed():
    def skips(seed: int) -> list[Decisions]:
        return levels(sweep(seed=seed, num_simulations=6))

    assert skips(1) == skips(1)
    assert skips(1) != skips(2)
    assert sorted(skips(1)) == sorted(skips(2))


def test_the_second_level_begins_with_the_best_path_and_the_best_edit_of_it():
    """Skipping layer 1 and skipping layer 4 alone are right, so they are tried together."""
    right = {(1, 0, 1, 1, 1, 1), (1, 1, 1, 1, 0, 1)}
    search = sweep(lambda decisions: float(decisions in right), num_simulations=NUM_SINGLE + 1)
    assert levels(search)[-1] == (1, 0, 1, 1, 0, 1)


def test_of_equally_right_edits_those_of_the_best_score_are_combined_first():
    search = SweepSearch(6, SearchConfig(strategy="sweep", num_simulations=18), Random(0))
    while asked := search.ask():
        (decisions,) = asked
        others = sum(decisions[layer] != 1 for layer in (0, 1, 3, 4))
        search.tell(decisions, 1.0, -float(decisions[2] + decisions[5] + others))
    assert levels(search)[-1] == (1, 1, 0, 1, 1, 0)


def test_of_equally_right_edits_those_that_leave_less_to_execute_are_combined_first():
    """Skips of two layers, where they don't overlap: all edits are worth the same."""
    search = sweep(lambda decisions: 1.0, num_simulations=NUM_SINGLE + 3)
    assert [num_executions(decisions) for decisions in levels(search)[-3:]] == [2, 2, 2]


def test_the_third_level_extends_the_best_pairs():
    goal = (2, 1, 0, 1, 2, 1)

    def reward(decisions: Decisions) -> float:
        made = sum(count == wanted != 1 for count, wanted in zip(decisions, goal, strict=True))
        other = sum(count not in (1, wanted) for count, wanted in zip(decisions, goal, strict=True))
        return max(0.0, (made - other) / 3)

    search = sweep(reward, num_simulations=700)
    first = neighbours(full_decisions(6))
    second = {decisions for single in first for decisions in neighbours(single)}

    assert next(d for d in levels(search) if d not in first | second) == goal


def test_a_round_never_reaches_beyond_a_level_that_is_not_observed():
    search = SweepSearch(6, SearchConfig(strategy="sweep", num_simulations=100), Random(0))
    search.tell(*search.ask(), 1.0)
    first = search.ask(maximum=60)

    assert len(first) == NUM_SINGLE
    assert search.ask(maximum=60) == []
    for decisions in first[:-1]:
        search.tell(decisions, 1.0)
    assert search.ask(maximum=60) == []
    search.tell(first[-1], 1.0)
    assert len(search.ask(maximum=60)) == 60
