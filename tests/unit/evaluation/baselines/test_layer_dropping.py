from __future__ import annotations

import itertools

import pytest
import torch

from drllm.errors import ConfigError
from drllm.evaluation.baselines.layer_dropping import (
    EvenlySpaced,
    LastLayers,
    LayerDropping,
    mixture,
)

L = 30


class Measured(LayerDropping):
    """Layers in an order that was found, not all of them."""

    def dropped(self, number):
        return [19, 26, 20, 12, 18, 25, 5, 3][:number]


KINDS = pytest.mark.parametrize("kind", [LastLayers, EvenlySpaced, Measured])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def routes_with(skipped, questions):
    """Routes of `L` layers that skip so many in sum."""
    routes = torch.ones(questions, L, dtype=torch.long)
    for place in range(skipped):
        routes[place % questions, place // questions] = 0
    return routes


@KINDS
@pytest.mark.parametrize(
    ("skipped", "questions"), [(0, 1), (7, 1), (8, 7), (19, 7), (0, 200), (2, 200), (1599, 200)]
)
def test_executions_are_those_of_the_routes(without_a_model, kind, skipped, questions):
    drawn = kind(without_a_model(L)).at(routes_with(skipped, questions), rng()).plan
    assert drawn.shape == (questions, L)
    assert int((drawn == 0).sum()) == skipped


@KINDS
def test_all_questions_drop_one_layer_more_or_less(without_a_model, kind):
    baseline = kind(without_a_model(L))
    drawn = baseline.at(routes_with(150, 40), rng()).plan
    assert {tuple(row) for row in drawn.tolist()} == {baseline.decisions(3), baseline.decisions(4)}
    assert int((drawn.sum(dim=1) == 26).sum()) == 30
    again, other = (baseline.at(routes_with(150, 40), rng(seed)).plan for seed in (0, 1))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other), "which questions drop more is drawn"


def test_where_more_is_executed_than_there_are_layers_the_full_path_runs(without_a_model):
    drawn = LastLayers(without_a_model(L)).at(torch.full((3, L), 2), rng())
    assert torch.equal(drawn.plan, torch.ones(3, L, dtype=torch.long))
    assert drawn.note == "runs 30 layers, having none to drop"


def test_even_distances_differ_by_one_layer_at_most_and_keep_both_ends(without_a_model):
    for number in range(L - 1):
        decisions = EvenlySpaced(without_a_model(L)).decisions(number)
        skipped = [layer for layer, runs in enumerate(decisions) if not runs]
        assert len(skipped) == number
        assert decisions[0] == decisions[-1] == 1
        gaps = [b - a for a, b in itertools.pairwise(skipped)]
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_the_deepest_layers_go_but_the_last_stays(without_a_model):
    for number in range(L - 1):
        decisions = LastLayers(without_a_model(L)).decisions(number)
        assert decisions == (1,) * (L - 1 - number) + (0,) * number + (1,)


@KINDS
def test_fewer_executions_than_layers_are_kept_cannot_be_had(without_a_model, kind):
    baseline = kind(without_a_model(L))
    if kind is not Measured:
        assert baseline.obstacle(2.0) is None
        assert baseline.obstacle(1.9) == (
            "it keeps 2 layers at least, and the routed model has 1.90 executions"
        )
    with pytest.raises(ConfigError, match="executions are wanted of a mixture"):
        baseline.at(routes_with(29, 1), rng())


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", [LastLayers, EvenlySpaced])
def test_a_model_of_two_ends_has_nothing_to_drop(without_a_model, kind, num_layers):
    baseline = kind(without_a_model(num_layers))
    assert baseline.decisions(0) == baseline.decisions(1) == (1,) * num_layers


@pytest.mark.parametrize("executions", [2, 2.4, 3.1, 5])
def test_a_mixture_of_unlike_decisions_meets_the_mean(executions):
    drawn = mixture((1, 0, 1, 0), (2, 1, 1, 1), executions, 50, rng())
    assert float(drawn.sum(dim=1).double().mean()) == pytest.approx(executions, abs=1.5 / 50)


@pytest.mark.parametrize("executions", [1.9, 5.1])
def test_a_mixture_cannot_leave_its_ends(executions):
    with pytest.raises(ConfigError, match="give a number from 2 to 5"):
        mixture((1, 0, 1, 0), (2, 1, 1, 1), executions, 50, rng())
