from __future__ import annotations

import pytest

from drllm.errors import ConfigError
from drllm.evaluation.opponents.greedy import greedy_order
from drllm.evaluation.opponents.measures import gold_logprob
from drllm.evaluation.opponents.static import nested

L = 4
TOLERANCE = 1e-4
"""Nats, as in the parity tests of scoring."""


def brute_force(measure, num_layers):
    """Give up layers one path at a time, without a batch or a shared beginning."""
    path, order, values = list(range(num_layers)), [], []
    values.append(measure(path))
    while len(path) > 1:
        tried = {layer: measure([each for each in path if each != layer]) for layer in path}
        best = max(tried, key=tried.get)
        path.remove(best)
        order.append(best)
        values.append(tried[best])
    return order, values


def test_the_order_equals_that_of_trying_one_path_at_a_time(batches, golds, slow_gold_logprob):
    found = greedy_order(gold_logprob(batches, golds), L)
    order, values = brute_force(slow_gold_logprob, L)
    assert list(found.layers) == order
    assert found.values == pytest.approx(values, abs=TOLERANCE)
    assert sorted(order) != order, "the order must not be that of the layers themselves"


def test_a_step_measures_all_its_candidates_at_once(batches, golds):
    sizes = []
    measure = gold_logprob(batches, golds)

    def counting(plans):
        sizes.append(len(plans))
        return measure(plans)

    greedy_order(counting, L)
    assert sizes == [1, 4, 3, 2]


def test_the_order_is_followed_as_a_plan(batches, golds):
    found = greedy_order(gold_logprob(batches, golds), L, most=2)
    assert len(found.layers) == 2
    decisions = nested(found.layers, L)(2)
    assert [layer for layer, runs in enumerate(decisions) if not runs] == sorted(found.layers)
    assert gold_logprob(batches, golds)([decisions]) == pytest.approx([found.values[-1]], abs=1e-4)


def test_layers_that_are_kept_are_never_given_up(batches, golds):
    first = greedy_order(gold_logprob(batches, golds), L).layers[0]
    found = greedy_order(gold_logprob(batches, golds), L, keep=[first])
    assert sorted([*found.layers, first]) == [0, 1, 2, 3]


def test_of_equal_layers_the_deepest_goes():
    assert greedy_order(lambda plans: [0.0] * len(plans), L).layers == (3, 2, 1)


def test_more_layers_than_there_are_to_give_up_are_refused():
    with pytest.raises(ConfigError, match="ask for at most 3"):
        greedy_order(lambda plans: [0.0] * len(plans), L, most=4)
    with pytest.raises(ConfigError, match="ask for at most 2"):
        greedy_order(lambda plans: [0.0] * len(plans), L, most=3, keep=[0, 1])
