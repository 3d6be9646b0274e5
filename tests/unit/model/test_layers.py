"""Which models can be routed: what the rule finds and what the check of its loop refuses."""

import accelerate
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from drllm.errors import ArchitectureError
from drllm.model.layers import can_pack, can_split, check_loop, find_layers
from drllm.models.routed_model import RoutedModel

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}


def test_a_second_list_of_the_same_length_is_refused(tiny_llama):
    model = tiny_llama()
    model.model.others = nn.ModuleList([nn.Identity() for _ in range(6)])
    with pytest.raises(ArchitectureError, match="found 2 lists of 6 layers"):
        find_layers(model)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("num_hidden_layers", 5, "found 0 lists of 5 layers"),
        # A state that skipping would break.
        ("num_kv_shared_layers", 2, "shares keys and values"),
        ("layer_types", ["full_attention", "linear_attention"] * 3, "linear_attention"),
        ("layers_block_type", ["attention", "mamba"] * 3, "mamba"),
    ],
)
def test_layers_that_cant_be_told_or_routed_are_refused(tiny_llama, name, value, reason):
    model = tiny_llama()
    setattr(model.config, name, value)
    with pytest.raises(ArchitectureError, match=reason):
        find_layers(model)


@pytest.mark.filterwarnings("ignore")  # Bert says that it was not made as a decoder
def test_what_is_no_decoder_only_language_model_is_refused():
    with pytest.raises(ArchitectureError, match="Linear is not a decoder-only language model"):
        find_layers(nn.Linear(2, 2))
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with pytest.raises(ArchitectureError, match="has an encoder"):
        find_layers(T5ForConditionalGeneration(config))
    model = BertLMHeadModel(BertConfig(num_hidden_layers=3, **SMALL)).eval()
    with pytest.raises(ArchitectureError, match="found 0 lists of 3 layers"):
        RoutedModel(model)


def probed(model):
    return check_loop(model, *find_layers(model))


def looping_over(model, layers_of):
    """Let the model's loop run over other layers, made of its own in each pass."""
    decoder, loop = model.model, type(model.model).forward

    def other_loop(*args, **kwargs):
        whole, decoder.layers = decoder.layers, layers_of(decoder.layers)
        try:
            return loop(decoder, *args, **kwargs)
        finally:
            decoder.layers = whole

    decoder.forward = other_loop


class Wrapped(nn.Module):
    """A layer whose output is changed on its way to the loop."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, *args, **kwargs):
        return self.change(self.layer(*args, **kwargs))


def each(layers, change):
    return nn.ModuleList([Wrapped(layer, change) for layer in layers])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_model_without_weights_is_not_run(tiny_model, family):
    model = tiny_model(family).to("meta")
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    assert RoutedModel(model).num_layers == 6


def test_a_model_whose_weights_accelerate_loads_is_probed(tiny_llama):
    model = tiny_llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert RoutedModel(model).num_layers == 6
    assert passes


def test_the_probe_leaves_no_trace(tiny_llama):
    model = tiny_llama()
    model.train()
    model.model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(layer._forward_hooks) for layer in model.model.layers]
    assert probed(model) is False
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(layer._forward_hooks) for layer in model.model.layers]


class Forgetful(nn.Module):
    """A layer without a state."""

    def forward(self, hidden, *args, **kwargs):
        return hidden


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: looping_over(model, lambda layers: layers[:3]), "called 3 of its 6 layers"),
        (lambda model: setattr(model.model.layers, "4", Forgetful()), "state other than K/V"),
    ],
)
def test_a_loop_that_leaves_layers_out_or_stores_nothing_is_refused(tiny_llama, change, said):
    model = tiny_llama()
    change(model)
    with pytest.raises(ArchitectureError, match=said):
        probed(model)


def unpacks_two(layers):
    def unpack(output):
        hidden, extra = output
        return hidden + 0 * extra

    return each(layers, unpack)


def adds_up(layers):
    sums = []

    def add(output):
        sums.extend(output[1:])
        return output[0] + sum(sums)

    return each(layers, add)


def takes_the_first(layers):
    return each(layers, lambda output: output[0])


@pytest.mark.parametrize("layers_of", [unpacks_two, adds_up, takes_the_first])
def test_a_loop_that_uses_more_than_the_hidden_state_is_refused(tiny_llama, layers_of):
    model = tiny_llama()
    model.model.layers = each(model.model.layers, lambda hidden: (hidden, torch.ones(1)))
    looping_over(model, layers_of)
    if layers_of is takes_the_first:  # what it ignores is no hindrance
        assert probed(model) is True
    else:
        with pytest.raises(ArchitectureError, match="return more than a hidden state"):
            probed(model)


def test_what_a_model_can_do_is_seen_through_the_override_of_routing(tiny_llama):
    model = tiny_llama()
    assert can_pack(model, 8)
    assert can_split(model)
    routed = RoutedModel(model)
    assert can_pack(model, 8)
    assert can_split(model)
    routed.detach()
