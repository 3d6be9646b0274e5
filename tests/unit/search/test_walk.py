import itertools
from random import Random

from drllm.config import SearchConfig
from drllm.search.actions import apply, legal_actions
from drllm.search.strategies import Evaluation
from drllm.search.strategies.walk import WalkSearch


def walk(num_layers: int, reward: float = 0.0, seed: int = 0, **settings: object) -> WalkSearch:
    """Walk to the end, every path being worth the same."""
    search = WalkSearch(num_layers, SearchConfig(strategy="walk", **settings), Random(seed))
    paths = search.start()
    while paths:
        paths = search.advance([Evaluation(reward)] * len(paths))
    return search


def neighbours(decisions: tuple[int, ...], limit: int) -> set[tuple[int, ...]]:
    return {apply(decisions, action) for action in legal_actions(decisions, limit)}


def test_each_path_is_one_edit_away_from_the_path_before():
    search = walk(30, num_simulations=20)
    paths = list(search.trials)
    assert len(paths) == 21
    for before, after in itertools.pairwise(paths):
        assert after in neighbours(before, limit=60)


def test_the_walk_ignores_what_paths_are_worth():
    assert list(walk(12, reward=0.0).trials) == list(walk(12, reward=0.9).trials)


def test_a_walk_at_its_end_starts_again_from_the_full_path():
    search = walk(6, num_simulations=40, budget=1.0)
    restarts = [
        after
        for before, after in itertools.pairwise(search.trials)
        if not legal_actions(before, limit=6)
        and search.trials[after].simulation == search.trials[before].simulation + 1
    ]
    assert restarts
    assert set(restarts) <= neighbours((1, 1, 1, 1, 1, 1), limit=6)


def test_a_path_met_again_counts_as_a_simulation_and_leaves_a_gap_in_their_numbers():
    search = walk(3, num_simulations=200)
    assert search.num_simulations == 200
    numbers = [trial.simulation for trial in search.trials.values()]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert len(search.trials) < numbers[-1] <= 200
