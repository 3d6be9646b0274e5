"""Attention and MLP of a layer, found by a rule and told by their names in every family."""

import contextlib

import pytest
import torch

from drllm.errors import ArchitectureError
from drllm.model.layers import find_layers
from drllm.model.sublayers import find_sublayers
from drllm.models.families import FAMILIES, REFUSED
from drllm.models.routed_model import RoutedModel
from slow_way import NOT_TOLD_APART, biased_model

ROUTED = sorted(FAMILIES.keys() - {f for group in list(REFUSED.values())[:2] for f in group})
QUICK = ("llama", "gpt2", "falcon", "gemma2", "mixtral", "deepseek_v2", "granitemoeshared")
TOO_OLD = {"biogpt": ("4.",), "gpt_bigcode": ("4.",)}
ATTENTION = ("self_attn", "self_attention", "attn", "attention", "mixer")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "moe", "ffn")
"""What families call their sublayers."""
pytestmark = pytest.mark.filterwarnings("ignore:.*sliding_window_pattern:FutureWarning")  # cohere2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(each, marks=[] if each in {*QUICK, *NOT_TOLD_APART} else pytest.mark.thorough)
        for each in ROUTED
    ],
)
def test_sublayers_are_those_of_the_familys_names_or_refused_with_the_reason(name):
    model = biased_model(name, TOO_OLD)
    if name in NOT_TOLD_APART:
        with pytest.raises(ArchitectureError, match=NOT_TOLD_APART[name]):
            find_sublayers(model)
        return
    _, layers = find_layers(model)
    for layer, found in zip(layers, find_sublayers(model), strict=True):
        children = dict(layer.named_children())
        assert found.attention in [children[key] for key in ATTENTION if key in children]
        assert list(found.mlps) == [children[key] for key in children if key in MLP]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_looking_for_sublayers_leaves_nothing_on_the_model(name, tiny_model):
    model, ids = tiny_model(name), torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    attributes = {key: sorted(vars(module)) for key, module in model.named_modules()}
    with contextlib.suppress(ArchitectureError):
        find_sublayers(model)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert {key: sorted(vars(module)) for key, module in model.named_modules()} == attributes
    assert torch.equal(model(ids).logits, before)


def test_a_layer_that_does_more_than_add_is_refused(tiny_llama):
    model = tiny_llama()
    layer = model.model.layers[3]
    plain = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: 2 * plain(hidden, *args, **kwargs)
    with pytest.raises(ArchitectureError, match="layer 3 of LlamaForCausalLM does more"):
        find_sublayers(model)


def test_a_routed_model_has_the_same_sublayers(tiny_llama):
    model = tiny_llama()
    expected = find_sublayers(model)
    routed = RoutedModel(model)
    assert find_sublayers(routed.model) == expected
