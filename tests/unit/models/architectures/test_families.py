from __future__ import annotations

import pytest
import torch

from drllm.errors import ArchitectureError
from drllm.models.architectures import families
from drllm.models.architectures.families import COMMON, FAMILIES, make_tiny


def test_the_same_seed_makes_the_same_model():
    first, again, other = make_tiny("qwen2"), make_tiny("qwen2"), make_tiny("qwen2", seed=1)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(first(ids).logits, again(ids).logits)
    assert not torch.equal(first(ids).logits, other(ids).logits)


def test_making_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_tiny("gpt2")
    assert torch.equal(expected, torch.rand(3))


def test_fields_of_the_configuration_can_be_given():
    model = make_tiny("llama", num_hidden_layers=3, attention="eager")
    assert (len(model.model.layers), model.config._attn_implementation) == (3, "eager")


def test_a_model_is_frozen_in_float32_and_evaluating():
    model = make_tiny("olmoe")
    assert not model.training
    assert {(torch.float32, False)} == {(p.dtype, p.requires_grad) for p in model.parameters()}


def test_an_unknown_family_is_an_error_with_the_nearest_name():
    with pytest.raises(ArchitectureError, match="did you mean 'mistral'"):
        make_tiny("mistrall")


def test_a_family_that_transformers_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FAMILIES, "no_such_family", {})
    with pytest.raises(ArchitectureError, match="has no no_such_family"):
        make_tiny("no_such_family")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_small_and_as_deep_as_the_others(family: str):
    if not families.known_to_transformers(family):
        pytest.skip(f"the installed transformers has no {family}")
    model = make_tiny(family)
    assert COMMON["num_hidden_layers"] == model.config.num_hidden_layers
    assert sum(p.numel() for p in model.parameters()) < 300_000
