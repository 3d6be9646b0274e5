from __future__ import annotations

from random import Random

import pytest

from drllm.config import SearchConfig
from drllm.paths import full_decisions, num_executions
from drllm.search.strategies import STRATEGIES, PathSearch, new_search
from drllm.search.strategies.mcts import TreeSearch
from drllm.search.strategies.sweep import SweepSearch
from drllm.search.strategies.walk import WalkSearch

KINDS = {"tree": TreeSearch, "sweep": SweepSearch, "walk": WalkSearch}


def start(strategy: str, num_layers: int = 12, **settings: object) -> PathSearch:
    return new_search(num_layers, SearchConfig(strategy=strategy, **settings), Random(0))


def run(search: PathSearch, full: float, right: int) -> list[tuple[int, ...]]:
    """Reward the full path with `full`, and other paths only if at most `right` executions long."""
    while asked := search.ask():
        (decisions,) = asked
        if num_executions(decisions) == search.num_layers and not search.tried:
            search.tell(decisions, full)
        else:
            search.tell(decisions, float(num_executions(decisions) <= right))
    return list(search.tried)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_the_setting_picks_the_strategy(strategy: str):
    assert type(start(strategy)) is KINDS[strategy]


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_the_settings_of_the_tree_change_the_tree_alone(strategy: str):
    def tried(**settings: float) -> list[tuple[int, ...]]:
        return run(start(strategy, num_simulations=300, **settings), full=1.0, right=10)

    changed = [tried(**{name: 0.0}) != tried() for name in TreeSearch.own_settings]

    assert changed == [strategy == "tree"] * len(TreeSearch.own_settings)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_the_full_path_comes_first_and_is_no_simulation(strategy: str):
    search = start(strategy)

    assert search.ask(maximum=5) == [full_decisions(12)]
    search.tell(full_decisions(12), 1.0)
    assert search.num_simulations_done == 0
    assert search.tried[full_decisions(12)] == (0, 1.0, None)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_nothing_is_proposed_before_the_full_path_is_observed(strategy: str):
    search = start(strategy)
    search.ask()

    assert search.ask(maximum=5) == []
    search.tell(full_decisions(12), 1.0)
    assert len(search.ask(maximum=5)) == 5


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_a_path_in_flight_is_not_proposed_again(strategy: str):
    search = start(strategy)
    search.tell(*search.ask(), 1.0)

    asked = [*search.ask(maximum=4), *search.ask(maximum=6)]
    assert len(set(asked)) == 10
    assert full_decisions(12) not in asked
    for decisions in asked:
        search.tell(decisions, 0.0)
    assert not set(search.ask(maximum=10)) & set(asked)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_paths_in_flight_count_towards_the_simulations(strategy: str):
    search = start(strategy, num_simulations=10)
    search.tell(*search.ask(), 1.0)

    asked = [*search.ask(maximum=6), *search.ask(maximum=6)]
    assert len(asked) == 10
    assert search.num_simulations_done == 0
    for decisions in asked:
        search.tell(decisions, 0.0)
    assert search.num_simulations_done == 10
    assert search.ask() == []


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_simulations_are_numbered_as_proposed_whatever_is_observed_first(strategy: str):
    search = start(strategy)
    search.tell(*search.ask(), 1.0)
    asked = search.ask(maximum=5)
    for decisions in reversed(asked):
        search.tell(decisions, 0.0)

    numbers = [search.tried[decisions].simulation for decisions in asked]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 1


@pytest.mark.parametrize("most", [0, -1])
def test_less_than_one_path_can_not_be_asked_for(most: int):
    with pytest.raises(ValueError, match="at least 1"):
        start("tree").ask(most)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_a_path_that_was_not_proposed_is_refused(strategy: str):
    search = start(strategy)
    search.ask()

    with pytest.raises(ValueError, match="not in flight"):
        search.tell((0,) + (1,) * 11, 1.0)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_a_path_that_was_observed_can_not_be_observed_again(strategy: str):
    search = start(strategy)
    search.tell(*search.ask(), 1.0)

    with pytest.raises(ValueError, match="not in flight"):
        search.tell(full_decisions(12), 1.0)


@pytest.mark.parametrize("reward", [-0.1, 1.1, float("nan")])
def test_a_reward_outside_0_to_1_is_refused(reward: float):
    search = start("tree")

    with pytest.raises(ValueError, match="not in"):
        search.tell(*search.ask(), reward)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused(score: float):
    search = start("tree")

    with pytest.raises(ValueError, match="not finite"):
        search.tell(*search.ask(), 1.0, score)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_a_score_is_no_part_of_the_reward_and_ends_nothing(strategy: str):
    search = start(strategy, stop_rule="paper", num_simulations=10)
    search.tell(*search.ask(), 0.0, -1.0)
    while asked := search.ask():
        search.tell(*asked, 0.0, 5.0)

    assert search.num_simulations_done == 10
    assert {tried.score for tried in search.tried.values()} == {-1.0, 5.0}


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_exhaust_uses_all_simulations_whatever_was_found(strategy: str):
    search = start(strategy, stop_rule="exhaust", num_simulations=30)

    run(search, full=0.0, right=12)
    assert search.num_simulations_done == 30


@pytest.mark.parametrize("strategy", STRATEGIES.names())
@pytest.mark.parametrize("rule", ["paper", "released"])
def test_the_first_improving_path_ends_the_search_even_if_it_is_longer(strategy: str, rule: str):
    search = start(strategy, stop_rule=rule)

    tried = run(search, full=0.0, right=24)
    assert len(tried) == 2
    assert search.ask() == []


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_paper_ends_with_the_first_right_path_that_is_shorter(strategy: str):
    search = start(strategy, stop_rule="paper")

    *others, last = run(search, full=1.0, right=24)
    assert num_executions(last) < 12
    assert all(num_executions(path) >= 12 for path in others)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_released_ends_with_the_first_right_path_that_saves_two_layers(strategy: str):
    search = start(strategy, stop_rule="released")

    *others, last = run(search, full=1.0, right=24)
    assert num_executions(last) <= 10
    assert all(num_executions(path) > 10 for path in others)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
@pytest.mark.parametrize("rule", ["paper", "released"])
def test_wrong_short_paths_end_nothing(strategy: str, rule: str):
    search = start(strategy, stop_rule=rule, num_simulations=25)

    run(search, full=1.0, right=0)
    assert search.num_simulations_done == 25


def test_a_partial_reward_is_not_right_and_ends_nothing():
    search = start("tree", stop_rule="paper", num_simulations=10)
    while asked := search.ask():
        search.tell(*asked, 0.99)

    assert search.num_simulations_done == 10


@pytest.mark.parametrize("strategy", STRATEGIES.names())
@pytest.mark.parametrize("rule", ["paper", "released"])
def test_once_a_path_ends_the_search_those_in_flight_are_observed_and_no_others(
    strategy: str, rule: str
):
    search = start(strategy, stop_rule=rule)
    search.tell(*search.ask(), 0.0)
    first, *others = search.ask(maximum=5)
    search.tell(first, 1.0)

    assert search.ask(maximum=5) == []
    for decisions in others:
        search.tell(decisions, 0.0)
    assert search.ask(maximum=5) == []
    assert list(search.tried) == [full_decisions(12), first, *others]
    assert search.num_simulations_done == 5
