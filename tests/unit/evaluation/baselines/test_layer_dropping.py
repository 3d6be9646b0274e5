"""Layers dropped in a fixed order, in that of their influence, and in a greedy one."""

import copy
import itertools

import pytest
import torch
from torch import nn

from drllm.errors import ConfigError
from drllm.evaluation.baselines.layer_dropping import (
    EvenlySpaced,
    LastLayers,
    LayerDropping,
    block_influence,
    drop_greedily,
    mix_decisions,
    order_by_influence,
)
from drllm.evaluation.baselines.material import make_measure
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.policies import FixedPolicy

L, SHALLOW = 30, 4
COSINE_TOLERANCE = 1e-5
"""Means of float32 cosines, computed in batches or alone; 1e-7 was seen."""


class Measured(LayerDropping):
    """Layers in an order that was found, not all of them."""

    def choose_layers(self, number):
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
    drawn = without_a_model(kind, L).make_run(routes_with(skipped, questions), rng()).routing
    assert drawn.shape == (questions, L)
    assert int((drawn == 0).sum()) == skipped


@KINDS
def test_all_questions_drop_one_layer_more_or_less(without_a_model, kind):
    baseline = without_a_model(kind, L)
    drawn = baseline.make_run(routes_with(150, 40), rng()).routing
    assert {tuple(row) for row in drawn.tolist()} == {
        baseline.choose_decisions(3),
        baseline.choose_decisions(4),
    }
    assert int((drawn.sum(dim=1) == 26).sum()) == 30
    again, other = (baseline.make_run(routes_with(150, 40), rng(seed)).routing for seed in (0, 1))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other), "which questions drop more is drawn"


def test_where_more_is_executed_than_there_are_layers_the_full_path_runs(without_a_model):
    drawn = without_a_model(LastLayers, L).make_run(torch.full((3, L), 2), rng())
    assert torch.equal(drawn.routing, torch.ones(3, L, dtype=torch.long))
    assert drawn.note == "runs all 30 layers, since it can't repeat any"


def test_even_distances_differ_by_one_layer_at_most_and_keep_both_ends(without_a_model):
    for number in range(L - 1):
        decisions = without_a_model(EvenlySpaced, L).choose_decisions(number)
        skipped = [layer for layer, runs in enumerate(decisions) if not runs]
        assert len(skipped) == number
        assert decisions[0] == decisions[-1] == 1
        gaps = [b - a for a, b in itertools.pairwise(skipped)]
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_the_deepest_layers_go_but_the_last_stays(without_a_model):
    for number in range(L - 1):
        decisions = without_a_model(LastLayers, L).choose_decisions(number)
        assert decisions == (1,) * (L - 1 - number) + (0,) * number + (1,)


@KINDS
def test_fewer_executions_than_layers_are_kept_cannot_be_had(without_a_model, kind):
    baseline = without_a_model(kind, L)
    if kind is not Measured:
        assert baseline.find_obstacle(2.0) is None
        assert baseline.find_obstacle(1.9) == (
            "it keeps at least 2 layers, and the routed model has 1.90 executions"
        )


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", [LastLayers, EvenlySpaced])
def test_a_model_of_two_ends_has_nothing_to_drop(without_a_model, kind, num_layers):
    baseline = without_a_model(kind, num_layers)
    assert baseline.choose_decisions(0) == baseline.choose_decisions(1) == (1,) * num_layers


@pytest.mark.parametrize("executions", [2, 2.4, 3.1, 5])
def test_a_mixture_of_unlike_decisions_meets_the_mean(executions):
    drawn = mix_decisions((1, 0, 1, 0), (2, 1, 1, 1), executions, 50, rng())
    assert float(drawn.sum(dim=1).double().mean()) == pytest.approx(executions, abs=1.5 / 50)


def by_hand(model, prompts):
    """One prompt at a time, from the hidden states that the plain model gives out."""
    plain = copy.deepcopy(model)
    plain.model.norm = nn.Identity()  # else the last hidden state is behind it
    cosines = []
    for prompt in prompts:
        with torch.no_grad():
            states = plain.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        pairs = itertools.pairwise(states)
        cosines.append(torch.stack([torch.cosine_similarity(a, b, dim=-1)[0] for a, b in pairs]))
    return (1 - torch.cat(cosines, dim=1).double().mean(dim=1)).tolist()


@pytest.mark.parametrize("decisions", [None, [0, 2, 1, 0]])
def test_influence_is_that_of_the_base_model_s_hidden_states_whatever_batch_and_policy(
    model, some_prompts, decisions
):
    model = copy.deepcopy(model)  # with an embedding of the padding token, which would be zeros
    model.model.embed_tokens.weight.data[0] = model.model.embed_tokens.weight[7]
    prompts = some_prompts(37)
    policy = None if decisions is None else FixedPolicy(decisions, 4)
    routed = RoutedModel(copy.deepcopy(model), policy=policy)
    found = block_influence(routed, prompts)
    assert found == pytest.approx(by_hand(model, prompts), abs=COSINE_TOLERANCE)
    assert max(found) - min(found) > 100 * COSINE_TOLERANCE


def test_a_layer_that_changes_nothing_has_no_influence_and_goes_first(tiny_llama, some_prompts):
    model = tiny_llama(num_layers=4)
    for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        linear.weight.data.zero_()
    found = block_influence(RoutedModel(model), some_prompts(11))
    assert found[2] == pytest.approx(0, abs=COSINE_TOLERANCE)
    assert order_by_influence(found)[0] == 2


def test_nothing_is_left_on_the_model(routed, some_prompts):
    routed.model(torch.tensor([[5, 6]]))
    before = routed.last_route.tolist()
    block_influence(routed, some_prompts(11))
    with pytest.raises(ConfigError, match="there are no prompts"):
        block_influence(routed, [])
    assert not any(layer._forward_hooks for layer in routed.injection.layers)
    assert before == routed.last_route.tolist()


def brute_force(measure, num_layers):
    """Drop layers one path at a time, without a batch or a shared beginning."""
    path, order = list(range(num_layers)), []
    while len(path) > 1:
        tried = {layer: measure([each for each in path if each != layer]) for layer in path}
        best = max(tried, key=tried.get)
        path.remove(best)
        order.append(best)
    return order


def test_the_order_equals_that_of_trying_one_path_at_a_time(routed, material, slow_gold_logprob):
    measure, order = (
        make_measure(routed, material, "answers"),
        brute_force(slow_gold_logprob, SHALLOW),
    )
    assert (
        drop_greedily(measure, SHALLOW, SHALLOW - 1)
        == drop_greedily(measure, SHALLOW, SHALLOW)
        == order
    )
    assert sorted(order) != order, "the order must not be that of the layers themselves"


def test_steps_are_made_as_far_as_they_are_asked_for_each_with_all_its_candidates():
    sizes = []

    def counting(plans):
        sizes.append(len(plans))
        return [float(plan[0] - plan[2]) for plan in plans]

    assert drop_greedily(counting, SHALLOW, 0) == []
    assert sizes == []
    order = drop_greedily(counting, SHALLOW, 2)
    assert order == drop_greedily(counting, SHALLOW, 1, order) == [2, 3]
    assert sizes == [4, 3]
    assert drop_greedily(counting, SHALLOW, 3, order)[:2] == order
    assert sizes == [4, 3, 2]


def test_layers_that_are_kept_are_never_dropped():
    order = drop_greedily(lambda plans: [0.0] * len(plans), SHALLOW, 3, keep=[0, 3])
    assert order == [2, 1]


def test_of_equal_layers_the_deepest_goes():
    assert drop_greedily(lambda plans: [0.0] * len(plans), SHALLOW, 3) == [3, 2, 1]
