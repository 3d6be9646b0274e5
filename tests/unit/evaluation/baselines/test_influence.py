from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from drllm.errors import ConfigError
from drllm.evaluation.baselines.layer_dropping import block_influence, order_by_influence
from drllm.models.routing.policies import FixedPolicy
from drllm.models.routing.routed_model import RoutedModel

COSINE_TOLERANCE = 1e-5
"""Means of float32 cosines, computed in batches or alone; 1e-7 was seen."""


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


@pytest.fixture(scope="module")
def model(model):
    """The model with an embedding of the padding token, which would else be zeros all the way."""
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.data[0] = other.model.embed_tokens.weight[7]
    return other


@pytest.fixture(scope="module")
def routed(model):
    return RoutedModel(copy.deepcopy(model))


@pytest.mark.parametrize("decisions", [None, [0, 2, 1, 0]])
def test_influence_is_that_of_the_base_model_s_hidden_states_whatever_batch_and_policy(
    model, some_prompts, decisions
):
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
