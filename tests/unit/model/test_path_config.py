"""What a config for a path says, and what is noticed where it can't say enough."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2MoeConfig

from drllm.errors import ArchitectureError
from drllm.model.layers import find_layers
from drllm.model.path_config import check_layers, reorder_config


def test_lists_of_one_value_per_layer_follow_the_path_in_a_copy(tiny_model):
    config = tiny_model("gemma3_text").config
    before = copy.deepcopy(config.to_dict())
    sliding, full = "sliding_attention", "full_attention"
    assert [sliding, sliding, full] * 2 == config.layer_types
    listed = reorder_config(config, [2, 0, 5, 5])
    assert listed.layer_types == [full, sliding, full, full]
    assert listed.num_hidden_layers == 4
    assert before == config.to_dict()


EXPERTS = Qwen2MoeConfig(num_hidden_layers=4, mlp_only_layers=[0, 3])
SWITCHES = LlamaConfig(num_hidden_layers=3, no_rope_layers=[1, 1, 0], eos_token_id=[2, 3, 4])


@pytest.mark.parametrize(
    ("config", "path", "name", "value"),
    [
        (SWITCHES, [2, 2, 0], "no_rope_layers", [0, 0, 1]),
        (SWITCHES, [0, 2], "eos_token_id", [2, 3, 4]),  # tokens, however many they are
        (EXPERTS, [3, 1, 0, 2, 3], "mlp_only_layers", [0, 2, 4]),  # indices become places
        (EXPERTS, [1, 2], "mlp_only_layers", []),
        (GPT2Config(n_layer=3), [0, 1, 1, 2], "n_layer", 4),  # the number has other names
        (GPT2Config(n_layer=3), [0, 1, 1, 2], "num_hidden_layers", 4),
    ],
)
def test_what_a_config_says_of_layers_follows_the_path_and_nothing_else(config, path, name, value):
    assert getattr(reorder_config(config, path), name) == value


def built(model, path):
    """Return the layers that the model's class makes of the config for a path."""
    with torch.device("meta"):
        listed = AutoModelForCausalLM.from_config(reorder_config(model.config, path))
    return find_layers(listed)[1]


def refused(ours, theirs, path):
    with pytest.raises(ArchitectureError) as caught:
        check_layers(ours, theirs, path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_layers_that_differ_in_index_and_in_what_is_done_with_them_are_the_same(tiny_llama):
    model = tiny_llama()
    assert model.model.layers[3].self_attn.layer_idx == 3
    model.train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    check_layers(built(model, [3, 0, 3]), model.model.layers, [3, 0, 3])


def test_another_scale_is_named(tiny_model):
    model = tiny_model("diffllama")  # a constant of its attention grows with the depth
    message = refused(built(model, [0, 2]), model.model.layers, [0, 2])
    assert "self_attn.lambda_init" in message
    assert str(model.model.layers[2].self_attn.lambda_init) in message


def test_another_window_is_named(tiny_llama):
    model = tiny_llama()
    model.model.layers[1].self_attn.sliding_window = 4
    message = refused(built(model, [0, 1]), model.model.layers, [0, 1])
    assert "would have None as self_attn.sliding_window instead of 4" in message


def test_another_shape_is_named(tiny_llama):
    ours, theirs = tiny_llama(intermediate_size=48).model.layers, tiny_llama().model.layers
    message = refused(ours, theirs, list(range(6)))
    assert "would have (48, 32) as the shape of mlp.gate_proj.weight instead of (64, 32)" in message


def test_a_tensor_that_no_checkpoint_holds_is_compared_by_its_values(tiny_llama):
    ours, theirs = tiny_llama().model.layers, tiny_llama().model.layers
    for layers in (ours, theirs):
        layers[1].register_buffer("window", torch.ones(3), persistent=False)
    check_layers(ours, theirs, list(range(6)))
    ours[1].window[2] = 0
    assert "other values in window" in refused(ours, theirs, list(range(6)))
