"""The last linear map of a layer's MLP, and the factor on its output, in families of every form."""

import pytest
import torch

from drllm.errors import ArchitectureError
from drllm.model.down_projections import find_down_projections
from drllm.model.layers import find_layers
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.injection import Driver

FOUND = {
    "llama": ("mlp.down_proj", 1.0),
    "gpt2": ("mlp.c_proj", 1.0),
    "gpt_neox": ("mlp.dense_4h_to_h", 1.0),
    "phi": ("mlp.fc2", 1.0),
    "falcon": ("mlp.dense_4h_to_h", 1.0),
    "deepseek_v3": ("mlp.shared_experts.down_proj", 1.0),
    "qwen2_moe": ("mlp.shared_expert.down_proj", None),
}
"""Family → the map in its last layer, and its factor; None if it differs between tokens."""

REFUSED = {
    "mixtral": "no linear map that ends its MLP",
    "opt": "no module of its own for the MLP",
}


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_map_of_the_mlp_is_found_with_its_factor(family, dtype, tiny_model):
    model = tiny_model(family).to(dtype)
    last = len(find_layers(model)[1]) - 1
    name, factor = FOUND[family]
    projection = find_down_projections(model, [last])[last]
    assert projection.name == f"{last}.{name}"
    assert projection.factor == factor
    assert projection.weight is projection.module.weight


def test_a_layer_with_large_outputs_is_measured_in_bfloat16(tiny_llama):
    model = tiny_llama()
    projection = find_layers(model)[1][3].mlp.down_proj
    projection.weight.data *= 1e5  # so that a step of bfloat16 is longer than a vector of norm 8
    model.to(torch.bfloat16)
    assert find_down_projections(model, [3])[3].factor == 1.0


@pytest.mark.parametrize("multiplier", [0.22, 3.0])
def test_a_constant_factor_is_measured(multiplier, tiny_model):
    model = tiny_model("granite", residual_multiplier=multiplier)
    for projection in find_down_projections(model, range(6)).values():
        assert projection.factor == pytest.approx(multiplier, rel=1e-3)


@pytest.mark.parametrize("family", REFUSED)
def test_a_layer_without_such_a_map_is_refused_with_the_reason(family, tiny_model):
    with pytest.raises(ArchitectureError, match=REFUSED[family]):
        find_down_projections(tiny_model(family), [3])


def test_looking_for_them_leaves_nothing_on_the_model(tiny_llama):
    model = tiny_llama()
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    find_down_projections(model, range(6))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(model(ids).logits, before)


def test_a_routed_model_has_the_same_ones_while_routing_is_off(tiny_llama):
    model = tiny_llama()
    expected = find_down_projections(model, range(6))
    routed = RoutedModel(model)
    with routed.injection.driven_by(Driver()):
        assert find_down_projections(routed.model, range(6)) == expected


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gemma2", "post_feedforward_layernorm"),
        ("gemma3_text", "post_feedforward_layernorm"),
        ("glm4", "post_mlp_layernorm"),
        ("olmo2", "post_feedforward_layernorm"),
        ("exaone4", "post_feedforward_layernorm"),
    ],
)
def test_a_norm_behind_the_mlp_is_found_with_its_gain(family, name, tiny_model):
    model = tiny_model(family)
    norm = find_layers(model)[1][3].get_submodule(name)
    norm.weight.data.uniform_(-0.3, 0.7)
    found = find_down_projections(model, [3])[3].norm
    assert found.name == f"3.{name}"
    states = torch.randn(2, norm.weight.shape[0])
    sizes = (states.square().mean(dim=1, keepdim=True) + found.epsilon).sqrt()
    torch.testing.assert_close(norm(states), (found.gain * states / sizes).float())


def test_a_norm_of_another_form_is_refused(tiny_model):
    model = tiny_model("olmo2")
    layer = model.model.layers[3]
    layer.post_feedforward_layernorm = torch.nn.LayerNorm(model.config.hidden_size, bias=False)
    with pytest.raises(ArchitectureError, match="isn't g"):
        find_down_projections(model, [3])
