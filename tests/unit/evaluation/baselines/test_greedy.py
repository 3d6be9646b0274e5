from __future__ import annotations

import pytest

from drllm.errors import ConfigError
from drllm.evaluation.baselines.fitting.measures import gold_logprob
from drllm.evaluation.baselines.greedy import Greedy

L = 4
TOLERANCE = 1e-4
"""Nats, as in the parity tests of scoring."""


def brute_force(measure, num_layers):
    """Give up layers one path at a time, without a batch or a shared beginning."""
    path, order, values = list(range(num_layers)), [], []
    while len(path) > 1:
        tried = {layer: measure([each for each in path if each != layer]) for layer in path}
        best = max(tried, key=tried.get)
        path.remove(best)
        order.append(best)
        values.append(tried[best])
    return order, values


def test_the_order_equals_that_of_trying_one_path_at_a_time(batches, golds, slow_gold_logprob):
    greedy = Greedy(gold_logprob(batches, golds), L)
    greedy(L - 1)
    order, values = brute_force(slow_gold_logprob, L)
    assert greedy.layers == order
    assert greedy.values == pytest.approx(values, abs=TOLERANCE)
    assert sorted(order) != order, "the order must not be that of the layers themselves"


def test_steps_are_made_as_far_as_they_are_asked_for_each_with_all_its_candidates(batches, golds):
    sizes = []
    measure = gold_logprob(batches, golds)

    def counting(plans):
        sizes.append(len(plans))
        return measure(plans)

    greedy = Greedy(counting, L)
    assert greedy(0) == (1,) * L
    assert sizes == []
    deep, shallow = greedy(2), greedy(1)
    assert sizes == [4, 3]
    assert sum(deep) < sum(shallow)
    greedy(3)
    assert sizes == [4, 3, 2]


def test_the_plan_gives_up_the_layers_of_the_order(batches, golds):
    greedy = Greedy(gold_logprob(batches, golds), L)
    decisions = greedy(2)
    assert [layer for layer, runs in enumerate(decisions) if not runs] == sorted(greedy.layers)
    assert gold_logprob(batches, golds)([decisions]) == pytest.approx(
        [greedy.values[-1]], abs=TOLERANCE
    )


def test_layers_that_are_kept_are_never_given_up(batches, golds):
    greedy = Greedy(gold_logprob(batches, golds), L)
    greedy(1)
    [first] = greedy.layers
    keeping = Greedy(gold_logprob(batches, golds), L, keep=[first])
    keeping(3)
    assert sorted([*keeping.layers, first]) == [0, 1, 2, 3]


def test_of_equal_layers_the_deepest_goes():
    greedy = Greedy(lambda plans: [0.0] * len(plans), L)
    greedy(3)
    assert greedy.layers == [3, 2, 1]


def test_more_layers_than_there_are_to_give_up_are_refused():
    with pytest.raises(ConfigError, match="at most 3 can be"):
        Greedy(lambda plans: [0.0] * len(plans), L)(4)
    with pytest.raises(ConfigError, match="at most 2 can be"):
        Greedy(lambda plans: [0.0] * len(plans), L, keep=[0, 1])(3)
