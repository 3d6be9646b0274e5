"""Which models can be routed: what the rule finds and what the probe refuses."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from drllm.errors import ArchitectureError
from drllm.models.base.capabilities import probe
from drllm.models.base.layers import find_layers
from drllm.models.routing.routed_model import RoutedModel

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}


def test_the_layers_are_the_list_inside_the_decoder(tiny_llama):
    model = tiny_llama()
    decoder, layers = find_layers(model)
    assert decoder is model.model
    assert layers is model.model.layers


def test_a_second_list_of_the_same_length_is_refused(tiny_llama):
    model = tiny_llama()
    model.model.others = nn.ModuleList([nn.Identity() for _ in range(6)])
    with pytest.raises(ArchitectureError, match="found 2 lists of 6 layers"):
        find_layers(model)


def test_a_list_of_another_length_than_the_config_says_is_refused(tiny_llama):
    model = tiny_llama()
    model.config.num_hidden_layers = 5
    with pytest.raises(ArchitectureError, match="found 0 lists of 5 layers"):
        find_layers(model)


def test_a_module_that_is_no_language_model_is_refused():
    with pytest.raises(ArchitectureError, match="Linear is not a decoder-only language model"):
        find_layers(nn.Linear(2, 2))


def test_a_model_with_an_encoder_is_refused():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with pytest.raises(ArchitectureError, match="has an encoder"):
        find_layers(T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("num_kv_shared_layers", 2, "shares keys and values"),
        ("layer_types", ["full_attention", "linear_attention"] * 3, "linear_attention"),
        ("layers_block_type", ["attention", "mamba"] * 3, "mamba"),
    ],
)
def test_layers_with_a_state_that_skipping_would_break_are_refused(tiny_llama, name, value, reason):
    model = tiny_llama()
    setattr(model.config, name, value)
    with pytest.raises(ArchitectureError, match=reason):
        find_layers(model)


@pytest.mark.filterwarnings("ignore")  # it says that it was not made as a decoder
def test_an_encoder_is_refused():
    model = BertLMHeadModel(BertConfig(num_hidden_layers=3, **SMALL)).eval()
    with pytest.raises(ArchitectureError, match="found 0 lists of 3 layers"):
        RoutedModel(model)


def probed(model):
    return probe(model, *find_layers(model))


def test_the_probe_leaves_no_trace(tiny_llama):
    model = tiny_llama()
    model.train()
    model.model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(layer._forward_hooks) for layer in model.model.layers]
    assert probed(model) is False
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(layer._forward_hooks) for layer in model.model.layers]


def test_a_loop_that_leaves_layers_out_is_refused(tiny_llama):
    model = tiny_llama()
    loop = type(model.model).forward

    def three_layers(*args, **kwargs):
        whole, model.model.layers = model.model.layers, model.model.layers[:3]
        try:
            return loop(model.model, *args, **kwargs)
        finally:
            model.model.layers = whole

    model.model.forward = three_layers
    with pytest.raises(ArchitectureError, match="called 3 of its 6 layers"):
        probed(model)


class Carrying(nn.Module):
    """A layer that hands a running sum on, beside its hidden state."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs), torch.ones(1)


@pytest.mark.parametrize("unpacks", [True, False], ids=["unpacks two", "adds up what comes"])
def test_a_loop_that_uses_more_than_the_hidden_state_is_refused(tiny_llama, unpacks):
    model = tiny_llama()
    decoder = model.model
    decoder.layers = nn.ModuleList([Carrying(layer) for layer in decoder.layers])
    loop = type(decoder).forward

    class Unpacking(nn.Module):
        def __init__(self, layer, sums):
            super().__init__()
            self.layer, self.sums = layer, sums

        def forward(self, *args, **kwargs):
            output = self.layer(*args, **kwargs)
            if unpacks:
                hidden, extra = output
                return hidden + 0 * extra
            self.sums.extend(output[1:])
            return output[0] + sum(self.sums)

    def unpacking_loop(*args, **kwargs):
        whole, sums = decoder.layers, []
        decoder.layers = nn.ModuleList([Unpacking(layer, sums) for layer in whole])
        try:
            return loop(decoder, *args, **kwargs)
        finally:
            decoder.layers = whole

    decoder.forward = unpacking_loop
    with pytest.raises(ArchitectureError, match="return more than a hidden state"):
        probed(model)


def test_extras_that_the_loop_ignores_are_no_hindrance(tiny_llama):
    model = tiny_llama()
    decoder, loop = model.model, type(model.model).forward
    decoder.layers = nn.ModuleList([Carrying(layer) for layer in decoder.layers])

    class First(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            return self.layer(*args, **kwargs)[0]

    def taking_the_first(*args, **kwargs):
        whole = decoder.layers
        decoder.layers = nn.ModuleList([First(layer) for layer in whole])
        try:
            return loop(decoder, *args, **kwargs)
        finally:
            decoder.layers = whole

    decoder.forward = taking_the_first
    assert probed(model) is True


def test_layers_that_store_nothing_are_refused(tiny_llama):
    model = tiny_llama()

    class Forgetful(nn.Module):
        def forward(self, hidden, *args, **kwargs):
            return hidden

    model.model.layers[4] = Forgetful()
    with pytest.raises(ArchitectureError, match="state other than K/V"):
        probed(model)
