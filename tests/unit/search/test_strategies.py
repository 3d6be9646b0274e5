from __future__ import annotations

from random import Random

import pytest

from drllm.config import STRATEGIES as ACCEPTED
from drllm.config import SearchConfig
from drllm.paths import full_decisions, num_executions
from drllm.search.mcts import TreeSearch
from drllm.search.strategies import STRATEGIES, PathSearch, new_search
from drllm.search.walk import WalkSearch

KINDS = {"tree": TreeSearch, "walk": WalkSearch}


def start(strategy: str, num_layers: int = 12, **settings: object) -> PathSearch:
    return new_search(num_layers, SearchConfig(strategy=strategy, **settings), Random(0))


def run(search: PathSearch, full: float, right: int) -> list[tuple[int, ...]]:
    """Reward the full path with `full`, and other paths only if at most `right` executions long."""
    while (decisions := search.propose()) is not None:
        if num_executions(decisions) == search.num_layers and not search.tried:
            search.observe(decisions, full)
        else:
            search.observe(decisions, float(num_executions(decisions) <= right))
    return list(search.tried)


def test_the_table_has_every_strategy_that_the_setting_accepts():
    assert set(STRATEGIES) == set(ACCEPTED)


@pytest.mark.parametrize("strategy", ACCEPTED)
def test_the_setting_picks_the_strategy(strategy: str):
    assert type(start(strategy)) is KINDS[strategy]


@pytest.mark.parametrize("strategy", ACCEPTED)
def test_the_full_path_comes_first_and_is_no_simulation(strategy: str):
    search = start(strategy)

    assert search.propose() == full_decisions(12)
    search.observe(full_decisions(12), 1.0)
    assert search.num_simulations_done == 0
    assert search.tried[full_decisions(12)] == (0, 1.0)


@pytest.mark.parametrize("strategy", ACCEPTED)
def test_a_path_is_proposed_again_until_it_is_observed(strategy: str):
    search = start(strategy)
    search.observe(search.propose(), 1.0)

    first = search.propose()
    assert search.propose() == first
    search.observe(first, 0.0)
    assert search.propose() != first


@pytest.mark.parametrize("strategy", ACCEPTED)
def test_a_path_that_was_not_proposed_is_refused(strategy: str):
    search = start(strategy)
    search.propose()

    with pytest.raises(ValueError, match="was not proposed"):
        search.observe((0,) + (1,) * 11, 1.0)


@pytest.mark.parametrize("reward", [-0.1, 1.1, float("nan")])
def test_a_reward_outside_0_to_1_is_refused(reward: float):
    search = start("tree")

    with pytest.raises(ValueError, match="not in"):
        search.observe(search.propose(), reward)


@pytest.mark.parametrize("strategy", ACCEPTED)
def test_exhaust_uses_all_simulations_whatever_was_found(strategy: str):
    search = start(strategy, stop_rule="exhaust", num_simulations=30)

    run(search, full=0.0, right=12)
    assert search.num_simulations_done == 30


@pytest.mark.parametrize("strategy", ACCEPTED)
@pytest.mark.parametrize("rule", ["paper", "released"])
def test_the_first_improving_path_ends_the_search_even_if_it_is_longer(strategy: str, rule: str):
    search = start(strategy, stop_rule=rule)

    tried = run(search, full=0.0, right=24)
    assert len(tried) == 2
    assert search.propose() is None


@pytest.mark.parametrize("strategy", ACCEPTED)
def test_paper_ends_with_the_first_right_path_that_is_shorter(strategy: str):
    search = start(strategy, stop_rule="paper")

    *others, last = run(search, full=1.0, right=24)
    assert num_executions(last) < 12
    assert all(num_executions(path) >= 12 for path in others)


@pytest.mark.parametrize("strategy", ACCEPTED)
def test_released_ends_with_the_first_right_path_that_saves_two_layers(strategy: str):
    search = start(strategy, stop_rule="released")

    *others, last = run(search, full=1.0, right=24)
    assert num_executions(last) <= 10
    assert all(num_executions(path) > 10 for path in others)


@pytest.mark.parametrize("strategy", ACCEPTED)
@pytest.mark.parametrize("rule", ["paper", "released"])
def test_wrong_short_paths_end_nothing(strategy: str, rule: str):
    search = start(strategy, stop_rule=rule, num_simulations=25)

    run(search, full=1.0, right=0)
    assert search.num_simulations_done == 25


def test_a_partial_reward_is_not_right_and_ends_nothing():
    search = start("tree", stop_rule="paper", num_simulations=10)
    while (decisions := search.propose()) is not None:
        search.observe(decisions, 0.99)

    assert search.num_simulations_done == 10
