from __future__ import annotations

import pytest

from drllm.evaluation.baselines.fitting.measures import by_answers
from drllm.evaluation.baselines.layer_dropping import Greedy

L = 4
TOLERANCE = 1e-4
"""Nats, as in the parity tests of scoring."""


def brute_force(measure, num_layers):
    """Drop layers one path at a time, without a batch or a shared beginning."""
    path, order, values = list(range(num_layers)), [], []
    while len(path) > 1:
        tried = {layer: measure([each for each in path if each != layer]) for layer in path}
        best = max(tried, key=tried.get)
        path.remove(best)
        order.append(best)
        values.append(tried[best])
    return order, values


def test_the_order_equals_that_of_trying_one_path_at_a_time(material, slow_gold_logprob):
    greedy = Greedy(by_answers(material), L)
    order, values = brute_force(slow_gold_logprob, L)
    assert greedy(L - 1) == greedy(L) == order
    assert greedy.values == pytest.approx(values, abs=TOLERANCE)
    assert sorted(order) != order, "the order must not be that of the layers themselves"


def test_steps_are_made_as_far_as_they_are_asked_for_each_with_all_its_candidates():
    sizes = []

    def counting(plans):
        sizes.append(len(plans))
        return [float(plan[0] - plan[2]) for plan in plans]

    greedy = Greedy(counting, L)
    assert greedy(0) == []
    assert sizes == []
    assert (greedy(2), greedy(1)) == ([2, 3], [2])
    assert sizes == [4, 3]
    greedy(3)
    assert sizes == [4, 3, 2]


def test_layers_that_are_kept_are_never_dropped():
    greedy = Greedy(lambda plans: [0.0] * len(plans), L, keep=[0, 3])
    assert greedy(3) == [2, 1]


def test_of_equal_layers_the_deepest_goes():
    assert Greedy(lambda plans: [0.0] * len(plans), L)(3) == [3, 2, 1]
