from random import Random

import pytest

from drllm.config import SearchConfig
from drllm.paths import full_decisions, num_executions
from drllm.search.strategies import STRATEGIES, PathSearch, new_search
from drllm.search.strategies.mcts import TreeSearch

FULL = full_decisions(12)
each_strategy = pytest.mark.parametrize("strategy", tuple(STRATEGIES))
each_rule = pytest.mark.parametrize("rule", ["paper", "released"])


def start(strategy: str, num_layers: int = 12, **settings: object) -> PathSearch:
    return new_search(num_layers, SearchConfig(strategy=strategy, **settings), Random(0))


def run(search: PathSearch, full: float, right: int) -> list[tuple[int, ...]]:
    """Reward the full path with `full`, and other paths only if at most `right` executions long."""
    search.tell(*search.ask(), full)
    while paths := search.ask():
        search.tell(*paths, float(num_executions(*paths) <= right))
    return list(search.trials)


@each_strategy
def test_the_settings_of_the_tree_change_the_tree_alone(strategy):
    def trial(**settings: float) -> list[tuple[int, ...]]:
        return run(start(strategy, num_simulations=300, **settings), full=1.0, right=10)

    changed = [trial(**{name: 0.0}) != trial() for name in TreeSearch.own_settings]

    assert changed == [strategy == "tree"] * len(TreeSearch.own_settings)


@each_strategy
def test_the_full_path_comes_first_and_alone_and_is_no_simulation(strategy):
    search = start(strategy)
    assert search.ask(maximum=5) == [FULL]
    assert search.ask(maximum=5) == []
    search.tell(FULL, 1.0)
    assert search.num_simulations_done == 0
    assert search.trials[FULL] == (0, 1.0, None)
    assert len(search.ask(maximum=5)) == 5


@each_strategy
def test_simulations_are_numbered_as_proposed_whatever_is_observed_first(strategy):
    search = start(strategy)
    search.tell(*search.ask(), 1.0)
    paths = search.ask(maximum=5)
    for decisions in reversed(paths):
        search.tell(decisions, 0.0)
    numbers = [search.trials[decisions].simulation for decisions in paths]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 1


def test_a_reward_out_of_range_is_refused():
    search = start("tree")
    search.ask()
    for reward in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="not in"):
            search.tell(FULL, reward)


@each_strategy
def test_neither_a_partial_reward_nor_a_score_ends_the_search(strategy):
    search = start(strategy, stop_rule="paper", num_simulations=10)
    search.tell(*search.ask(), 0.0, -1.0)
    while paths := search.ask():
        search.tell(*paths, 0.99, 5.0)
    assert search.num_simulations_done == 10
    assert {trial.score for trial in search.trials.values()} == {-1.0, 5.0}


@each_strategy
def test_exhaust_uses_all_simulations_whatever_was_found(strategy):
    search = start(strategy, stop_rule="exhaust", num_simulations=30)
    run(search, full=0.0, right=12)
    assert search.num_simulations_done == 30


@each_strategy
@each_rule
def test_the_first_improving_path_ends_the_search_even_if_it_is_longer(strategy, rule):
    search = start(strategy, stop_rule=rule)
    trial = run(search, full=0.0, right=24)
    assert len(trial) == 2
    assert search.ask() == []


@each_strategy
@pytest.mark.parametrize(("rule", "saved"), [("paper", 1), ("released", 2)])
def test_the_first_right_path_that_saves_one_layer_or_two_ends_the_search(strategy, rule, saved):
    *others, last = run(start(strategy, stop_rule=rule), full=1.0, right=24)
    assert num_executions(last) <= 12 - saved
    assert all(num_executions(path) > 12 - saved for path in others)


@each_strategy
@each_rule
def test_wrong_short_paths_end_nothing(strategy, rule):
    search = start(strategy, stop_rule=rule, num_simulations=25)
    run(search, full=1.0, right=0)
    assert search.num_simulations_done == 25


@each_strategy
@each_rule
def test_once_a_path_ends_the_search_those_in_flight_are_observed_and_no_others(strategy, rule):
    search = start(strategy, stop_rule=rule)
    search.tell(*search.ask(), 0.0)
    first, *others = search.ask(maximum=5)
    search.tell(first, 1.0)

    assert search.ask(maximum=5) == []
    for decisions in others:
        search.tell(decisions, 0.0)
    assert search.ask(maximum=5) == []
    assert list(search.trials) == [FULL, first, *others]
    assert search.num_simulations_done == 5


def test_rounds_of_several_along_a_chain_try_the_same_paths_as_rounds_of_one():
    alone, together = (start("walk", num_simulations=200) for _ in range(2))
    for search, maximum in ((alone, 1), (together, 7)):
        while paths := search.ask(maximum):
            for decisions in reversed(paths):
                search.tell(decisions, float(Random(str(decisions)).random() < 0.5))
    assert alone.trials == together.trials  # simulations too
