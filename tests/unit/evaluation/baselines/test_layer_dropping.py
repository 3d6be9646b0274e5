from __future__ import annotations

import itertools

import pytest
import torch

from drllm.errors import ConfigError
from drllm.evaluation.baselines.layer_dropping import (
    evenly_spaced,
    last_layers,
    mixture,
    nested,
    skipping,
)

L = 30
PLANS = {
    "last": last_layers(L),
    "even": evenly_spaced(L),
    "measured": nested([19, 26, 20, 12, 18, 25, 5, 3], L),
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("executions", [30, 29.99, 27.3, 25.5, 23, 22.01])
@pytest.mark.parametrize("questions", [1, 7, 200])
def test_mean_executions_are_as_near_as_whole_questions_allow(plan, executions, questions):
    drawn = skipping(plan, executions, questions, rng())
    assert drawn.shape == (questions, L)
    mean = float(drawn.sum(dim=1).double().mean())
    assert abs(mean - executions) <= 0.5 / questions + 1e-9


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_all_questions_run_the_plan_with_one_layer_more_or_less(plan):
    drawn = skipping(plan, 26.25, 40, rng())
    assert {tuple(row) for row in drawn.tolist()} == {plan(3), plan(4)}
    assert int((drawn.sum(dim=1) == 26).sum()) == 30


def test_which_questions_give_up_more_is_drawn():
    first, again, other = (skipping(last_layers(L), 26.5, 40, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("num_skipped", range(L - 1))
def test_even_distances_differ_by_one_layer_at_most_and_keep_both_ends(num_skipped):
    decisions = evenly_spaced(L)(num_skipped)
    skipped = [layer for layer, runs in enumerate(decisions) if not runs]
    assert len(skipped) == num_skipped
    assert decisions[0] == decisions[-1] == 1
    gaps = [b - a for a, b in itertools.pairwise(skipped)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize("num_skipped", range(L - 1))
def test_the_deepest_layers_go_but_the_last_stays(num_skipped):
    path = [layer for layer, runs in enumerate(last_layers(L)(num_skipped)) if runs]
    assert path == [*range(L - 1 - num_skipped), L - 1]


@pytest.mark.parametrize("plan", [last_layers(L), evenly_spaced(L), nested(range(L), L)])
def test_no_plan_gives_up_everything(plan):
    with pytest.raises(ConfigError, match="ask for more executions"):
        plan(L)
    with pytest.raises(ConfigError, match="ask for more executions"):
        skipping(plan, 0.5, 10, rng())


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("plan", [last_layers, evenly_spaced])
def test_a_model_of_two_ends_has_nothing_to_give_up(plan, num_layers):
    assert plan(num_layers)(0) == (1,) * num_layers
    with pytest.raises(ConfigError, match="at most 0 can be"):
        plan(num_layers)(1)


def test_more_executions_than_layers_are_refused():
    with pytest.raises(ConfigError, match="give a number up to 30"):
        skipping(last_layers(L), 30.5, 10, rng())


@pytest.mark.parametrize("executions", [2, 2.4, 3.1, 5])
def test_a_mixture_of_unlike_decisions_meets_the_mean(executions):
    drawn = mixture((1, 0, 1, 0), (2, 1, 1, 1), executions, 50, rng())
    assert float(drawn.sum(dim=1).double().mean()) == pytest.approx(executions, abs=1.5 / 50)


@pytest.mark.parametrize("executions", [1.9, 5.1])
def test_a_mixture_cannot_leave_its_ends(executions):
    with pytest.raises(ConfigError, match="give a number from 2 to 5"):
        mixture((1, 0, 1, 0), (2, 1, 1, 1), executions, 50, rng())
