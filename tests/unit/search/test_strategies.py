from random import Random

import pytest

from drllm.config import SearchConfig
from drllm.paths import full_decisions, num_executions
from drllm.search.strategies import STRATEGIES, Evaluation, PathSearch, new_search
from drllm.search.strategies.mcts import TreeSearch

FULL = full_decisions(12)
each_strategy = pytest.mark.parametrize("strategy", tuple(STRATEGIES))
each_rule = pytest.mark.parametrize("rule", ["paper", "released"])


def new(strategy: str, num_layers: int = 12, leaves: int = 1, **settings: object) -> PathSearch:
    config = SearchConfig(strategy=strategy, leaves_per_round=leaves, **settings)
    return new_search(num_layers, config, Random(0))


def run(search: PathSearch, full: float, right: int) -> list[tuple[int, ...]]:
    """Reward the full path with `full`, and other paths only if at most `right` executions long."""
    search.start()
    paths = search.advance([Evaluation(full)])
    while paths:
        paths = search.advance([Evaluation(float(num_executions(path) <= right)) for path in paths])
    return list(search.trials)


@each_strategy
def test_the_settings_of_the_tree_change_the_tree_alone(strategy):
    def trial(**settings: float) -> list[tuple[int, ...]]:
        return run(new(strategy, num_simulations=300, **settings), full=1.0, right=10)

    changed = [trial(**{name: 0.0}) != trial() for name in TreeSearch.own_settings]

    assert changed == [strategy == "tree"] * len(TreeSearch.own_settings)


@each_strategy
def test_the_full_path_comes_first_and_alone_and_is_no_simulation(strategy):
    search = new(strategy, leaves=5)
    assert search.start() == [FULL]
    assert search.num_simulations == 0
    assert len(search.advance([Evaluation(1.0)])) == 5
    assert search.trials == {FULL: (0, 1.0, None)}


@each_strategy
def test_simulations_are_numbered_in_the_order_of_their_paths(strategy):
    search = new(strategy, leaves=5)
    search.start()
    paths = search.advance([Evaluation(1.0)])
    search.advance([Evaluation(0.0)] * 5)
    numbers = [search.trials[decisions].simulation for decisions in paths]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 1


def test_a_reward_out_of_range_is_refused():
    search = new("tree")
    search.start()
    for reward in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="not in"):
            search.advance([Evaluation(reward)])
    assert search.trials == {}


@each_strategy
def test_neither_a_partial_reward_nor_a_score_ends_the_search(strategy):
    search = new(strategy, stop_rule="paper", num_simulations=10)
    search.start()
    paths = search.advance([Evaluation(0.0, -1.0)])
    while paths:
        paths = search.advance([Evaluation(0.99, 5.0)])
    assert search.num_simulations == 10
    assert {trial.score for trial in search.trials.values()} == {-1.0, 5.0}


@each_strategy
def test_exhaust_uses_all_simulations_whatever_was_found(strategy):
    search = new(strategy, stop_rule="exhaust", num_simulations=30)
    run(search, full=0.0, right=12)
    assert search.num_simulations == 30


@each_strategy
@each_rule
def test_the_first_improving_path_ends_the_search_even_if_it_is_longer(strategy, rule):
    search = new(strategy, stop_rule=rule)
    trial = run(search, full=0.0, right=24)
    assert len(trial) == 2


@each_strategy
@pytest.mark.parametrize(("rule", "saved"), [("paper", 1), ("released", 2)])
def test_the_first_right_path_that_saves_one_layer_or_two_ends_the_search(strategy, rule, saved):
    *others, last = run(new(strategy, stop_rule=rule), full=1.0, right=24)
    assert num_executions(last) <= 12 - saved
    assert all(num_executions(path) > 12 - saved for path in others)


@each_strategy
@each_rule
def test_wrong_short_paths_end_nothing(strategy, rule):
    search = new(strategy, stop_rule=rule, num_simulations=25)
    run(search, full=1.0, right=0)
    assert search.num_simulations == 25


@each_strategy
@each_rule
def test_once_a_path_ends_the_search_the_others_of_its_round_count_and_no_more_come(strategy, rule):
    search = new(strategy, leaves=5, stop_rule=rule)
    search.start()
    paths = search.advance([Evaluation(0.0)])
    assert search.advance([Evaluation(1.0), *[Evaluation(0.0)] * 4]) == []
    assert list(search.trials) == [FULL, *paths]
    assert search.num_simulations == 5


def test_rounds_of_several_along_a_chain_try_the_same_paths_as_rounds_of_one():
    alone, together = (new("walk", leaves=leaves, num_simulations=200) for leaves in (1, 7))
    for search in (alone, together):
        paths = search.start()
        while paths:
            paths = search.advance(
                [Evaluation(float(Random(str(decisions)).random() < 0.5)) for decisions in paths]
            )
    assert alone.trials == together.trials  # simulations too
