"""Derived costs against torch's own counter, and against the tensors in a real cache."""

import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drllm.errors import ArchitectureError
from drllm.evaluation.flops import ModelShape, kv_bytes, prompt_flops
from drllm.evaluation.latency import empty_cache
from drllm.models.families import FAMILIES
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from slow_way import stored_bytes

DECISIONS = [
    [1, 1, 1, 1, 1, 1],
    [0, 1, 2, 1, 0, 1],
    [2, 2, 2, 2, 2, 2],
    [0, 0, 0, 1, 0, 0],
]
DENSE = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "smollm3", "gpt_neox", "gpt2")


def ids(num_tokens):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 101, (1, num_tokens), generator=generator)


def counted(call):
    """Return what torch's counter adds up while a call runs.

    Without the angles of rotations, which some versions of transformers make by a product of
    matrices, positions times frequencies.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    parts = counter.get_flop_counts().items()
    angles = [of.values() for name, of in parts if "rotary" in name.rpartition(".")[2]]
    return counter.get_total_flops() - sum(map(sum, angles))


@pytest.mark.parametrize("family", DENSE)
def test_flops_of_a_prompt_are_those_that_torch_counts(tiny_model, family):
    model = tiny_model(family, attention="eager")
    shape, T = ModelShape.from_model(model), 13  # longer than what a sliding layer sees
    routed = RoutedModel(model)
    assert ModelShape.from_model(model) == shape
    for decisions in DECISIONS:
        with routed.fixed(decisions):
            found = counted(lambda: model(ids(T), logits_to_keep=1))
        derived = prompt_flops(shape, decisions, T)
        assert derived.weights + derived.attention == found


PATH = StaticPath([0, 2, 1, 2, 5, 4])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3"])
def test_a_static_path_costs_what_torch_counts(tiny_model, family):
    model = tiny_model(family, attention="eager")
    routed, cache = RoutedModel(model), empty_cache(model)
    shape = ModelShape.from_model(model)
    with routed.fixed(PATH):
        found = counted(lambda: model(ids(13), logits_to_keep=1, **cache))
    derived = prompt_flops(shape, PATH, 13)
    assert derived.weights + derived.attention == found
    assert 13 * kv_bytes(shape, PATH) == stored_bytes(*cache.values())


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_derived_exactly_or_refused(tiny_model, family):
    try:
        model = tiny_model(family, attention="eager")
        shape = ModelShape.from_model(model)
    except (ArchitectureError, ValueError) as reason:
        pytest.skip(str(reason))
    cache = empty_cache(model)
    # Some models of some versions compute the logits of every token; derived are the last one's.
    can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {**cache, "logits_to_keep": 1} if can_leave_out else cache
    left_out = 0 if can_leave_out else 2 * shape.head_entries * 12
    found = counted(lambda: model(ids(13), **options))
    derived = prompt_flops(shape, [1] * 6, 13)
    assert derived.weights + derived.attention + left_out == found


def test_what_grows_with_the_length_is_told_apart():
    shape = ModelShape((100, 200), 0, query_size=32, kv_bytes_per_layer=64)
    once, twice = (prompt_flops(shape, [1, 1], num_tokens=n) for n in (10, 20))
    assert twice.weights == 2 * once.weights
    assert twice.attention == 4 * once.attention


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_are_those_in_the_cache(tiny_model, family, dtype):
    model = tiny_model(family).to(dtype)
    shape, routed = ModelShape.from_model(model), RoutedModel(model)
    for decisions in DECISIONS:
        cache = empty_cache(model)
        for num_read, part in ((5, 5), (6, 1)):  # a sliding layer sees them all
            with routed.fixed(decisions), torch.no_grad():
                model(ids(part), **cache)
            assert num_read * kv_bytes(shape, decisions) == stored_bytes(*cache.values())


@pytest.mark.parametrize(
    ("family", "reason"),
    [("olmoe", "num_experts"), ("granitemoe", "num_local_experts"), ("gpt_bigcode", "multi_query"),
     ("minicpm3", "kv_lora_rank"), ("diffllama", "lambda_std_dev")],
)  # fmt: skip
def test_models_whose_cost_does_not_follow_are_refused(tiny_model, family, reason):
    with pytest.raises(ArchitectureError, match=f"has {reason} = .*measured time"):
        ModelShape.from_model(tiny_model(family))


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1", "rwkv"])
def test_models_with_a_recurrent_state_are_refused(tiny_model, family):
    # Which field names the state differs between versions of transformers.
    with pytest.raises(ArchitectureError, match="K/V"):
        ModelShape.from_model(tiny_model(family))


def test_a_recurrent_state_is_refused_whatever_the_configuration_says(tiny_llama):
    model = tiny_llama()
    model._is_stateful = True
    with pytest.raises(ArchitectureError, match=r"keeps a recurrent state .*measured time"):
        ModelShape.from_model(model)


def test_packed_weights_count_as_what_they_stand_for(tiny_llama):
    model, plain = tiny_llama(), ModelShape.from_model(tiny_llama())
    linear = model.model.layers[0].mlp.up_proj
    packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
    linear.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert ModelShape.from_model(model) == plain
