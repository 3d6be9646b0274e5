"""What holds for every search, whatever the model, the budget, the rewards and the seed."""

import dataclasses
import itertools
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drllm.config import STOP_RULES, SearchConfig
from drllm.cost import max_executions
from drllm.paths import Decisions, full_decisions, num_executions
from drllm.search.actions import apply, legal_actions
from drllm.search.strategies import STRATEGIES, Evaluation, new_search
from drllm.search.strategies.mcts import TreeSearch

configs = st.builds(
    SearchConfig,
    num_simulations=st.integers(1, 120),
    budget=st.sampled_from([1.0, 1.1, 1.5, 2.0]),
    strategy=st.sampled_from(tuple(STRATEGIES)),
    stop_rule=st.sampled_from(STOP_RULES),
    exploration_constant=st.floats(0, 10),
    length_penalty=st.floats(0, 10),
    random_child_probability=st.floats(0, 1),
)
layers = st.integers(1, 14)
seeds = st.integers(0, 2**32)
scales = st.sampled_from([0, 1, 2, 5])
mosts = st.sampled_from([1, 2, 7, 100])


def get_reward(decisions, seed, scale):
    """A reward without order: always 0, 0 or 1, or one of a few steps."""
    steps = Random(f"{seed} {decisions}").randint(0, scale)
    return steps / scale if scale else 0.0


def score_of(decisions, seed):
    """A score without order; with every other seed there is none."""
    return None if seed % 2 else Random(f"score {seed} {decisions}").gauss(0, 2)


def finish(search, most, seed, scale):
    """Run a search to its end, and check each round."""
    paths = search.start()
    while paths:
        assert len(paths) <= most
        assert len({*paths}) == len(paths)
        assert not search.trials.keys() & {*paths}
        paths = search.advance(
            [
                Evaluation(get_reward(decisions, seed, scale), score_of(decisions, seed))
                for decisions in paths
            ]
        )
    return search


def run(num_layers, config, seed, scale, most=1):
    config = dataclasses.replace(config, leaves_per_round=most)
    return finish(new_search(num_layers, config, Random(seed)), most, seed, scale)


class Watched(TreeSearch):
    """A tree that counts its steps: how often a simulation went from one node to the next."""

    def __init__(self, num_layers, config, rng):
        self.steps: Counter[tuple[Decisions, Decisions]] = Counter()
        super().__init__(num_layers, config, rng)

    def _count_visits(self, trail):
        self.steps.update(itertools.pairwise(node.decisions for node in trail))
        super()._count_visits(trail)


def run_tree(num_layers, config, seed, scale, most):
    config = dataclasses.replace(config, leaves_per_round=most)
    return finish(Watched(num_layers, config, Random(seed)), most, seed, scale)


@given(layers, configs, seeds, scales, mosts)
def test_every_path_can_be_run_and_is_within_the_budget(num_layers, config, seed, scale, most):
    search = run(num_layers, config, seed, scale, most)
    limit = max_executions(config.budget, num_layers)
    for decisions in search.trials:
        assert len(decisions) == num_layers
        assert set(decisions) <= {0, 1, 2}
        assert 1 <= num_executions(decisions) <= limit


@given(layers, configs, seeds, scales, mosts)
def test_a_search_never_does_more_simulations_than_asked_for(num_layers, config, seed, scale, most):
    search = run(num_layers, config, seed, scale, most)
    assert len(search.trials) - 1 <= search.num_simulations <= config.num_simulations
    numbers = [trial.simulation for trial in search.trials.values()]
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) <= set(range(config.num_simulations + 1))
    assert numbers == sorted(numbers)


@given(layers, configs, seeds, scales, mosts)
def test_the_same_seed_and_rewards_try_the_same_paths(num_layers, config, seed, scale, most):
    first, second = (run(num_layers, config, seed, scale, most) for _ in range(2))
    assert list(first.trials.items()) == list(second.trials.items())


@given(layers, configs, seeds, scales)
def test_under_every_stop_rule_only_the_last_path_can_be_one_that_stops(
    num_layers, config, seed, scale
):
    search = run(num_layers, config, seed, scale)
    *earlier, _ = search.trials
    full = search.trials[full_decisions(num_layers)].reward
    saved = {"paper": 1, "released": 2, "exhaust": num_layers + 1}[config.stop_rule]
    for decisions in earlier[1:]:
        right = search.trials[decisions].reward == 1
        improving = right and full < 1 and config.stop_rule != "exhaust"
        assert not improving
        assert not (right and num_layers - num_executions(decisions) >= saved)


@given(layers, configs, seeds, scales, mosts)
def test_the_same_seed_and_rewards_give_the_same_tree(num_layers, config, seed, scale, most):
    first, second = (run_tree(num_layers, config, seed, scale, most) for _ in range(2))

    def statistics(search):
        return [
            (node.decisions, node.visits, node.value_sum, [*node.children])
            for node in search.nodes.values()
        ]

    assert statistics(first) == statistics(second)
    assert first.steps == second.steps


@given(layers, configs, seeds, scales, mosts)
def test_the_trees_statistics_add_up(num_layers, config, seed, scale, most):
    search = run_tree(num_layers, config, seed, scale, most)

    assert set(search.nodes) == set(search.trials)  # one node a vector, one vector a simulation
    assert search.root.visits == search.num_simulations + 1
    rewards = [trial.reward for trial in search.trials.values()]
    assert search.root.value_sum == pytest.approx(sum(rewards))
    left, arrived = Counter(), Counter({search.root.decisions: search.root.visits})
    for (before, after), times in search.steps.items():
        left[before] += times
        arrived[after] += times
    for decisions, node in search.nodes.items():
        assert node.decisions == decisions
        assert node.executions == num_executions(decisions)
        assert 0 <= node.value_sum <= node.visits
        assert node.visits == 1 + left[decisions] == arrived[decisions]


@given(layers, configs, seeds, scales, mosts)
def test_every_child_is_one_legal_edit_away_and_the_edits_own_node(
    num_layers, config, seed, scale, most
):
    search = run_tree(num_layers, config, seed, scale, most)
    for node in search.nodes.values():
        legal = legal_actions(node.decisions, search.limit)
        assert sorted([*node.children, *node.untried]) == sorted(legal)  # each once
        for action, child in node.children.items():
            assert child is search.nodes[apply(node.decisions, action)]
            assert child.decisions != node.decisions


@given(
    st.integers(1, 4),
    st.sampled_from([1.0, 1.1, 1.5, 2.0]),
    seeds,
    scales,
    mosts,
)
@settings(max_examples=60)
def test_a_search_given_enough_simulations_tries_everything_and_ends(
    num_layers, budget, seed, scale, most
):
    config = SearchConfig(budget=budget, num_simulations=1000)
    search = run(num_layers, config, seed, scale, most)

    limit = max_executions(budget, num_layers)
    front, everything = [full_decisions(num_layers)], {full_decisions(num_layers)}
    while front:
        decisions = front.pop()
        edited = {apply(decisions, action) for action in legal_actions(decisions, limit)}
        front += edited - everything
        everything |= edited
    assert set(search.trials) == everything


@given(st.integers(1, 3), configs, seeds, scales, mosts)
def test_every_search_of_a_tiny_model_ends_by_itself(num_layers, config, seed, scale, most):
    search = run(num_layers, config, seed, scale, most)
    assert len(search.trials) <= 3**num_layers - 1
