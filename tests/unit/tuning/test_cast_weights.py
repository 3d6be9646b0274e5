"""Frozen weights that are cast once for autocast."""

import pytest
import torch

from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.tuning import cast_weights
from drllm.tuning.cast_weights import CastWeights, list_frozen_maps
from drllm.tuning.distillation import Distillation

BATCH = [(5, 6, 7, 8, 9), (7, 8, 4)]
PATH = StaticPath([0, 1, 2, 4])


@pytest.fixture
def routed(tiny_model):
    return RoutedModel(tiny_model("gemma3_text", tie_word_embeddings=True).requires_grad_(False))


@pytest.fixture
def train(routed):
    """A function that computes the gradients of LoRA weights in bfloat16."""
    parameters = routed.injection.create_lora(
        "trained", rank=2, alpha=2, layers=PATH.layers, seed=0
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)

    def run():
        path = PATH.with_adapter("trained")
        distillation = Distillation(routed, path, 0, parameters, torch.bfloat16)
        kl = distillation.compute_gradients(BATCH)
        return float(kl), [parameter.grad.clone() for parameter in parameters]

    return run


def test_gradients_are_those_of_autocast_bit_by_bit(train, monkeypatch):
    kl, gradients = train()
    monkeypatch.setattr(cast_weights, "SHARE_OF_MEMORY", 0.0)  # nothing is cast beforehand
    slow_kl, slow_gradients = train()
    assert kl == slow_kl
    for gradient, slow_gradient in zip(gradients, slow_gradients, strict=True):
        assert torch.equal(gradient, slow_gradient)


def test_each_weight_is_cast_once(routed):
    weights = CastWeights(routed.model, torch.bfloat16)
    head = routed.model.get_output_embeddings()
    with weights.use():
        first = head.forward.__self__.weight
    with weights.use():
        assert head.forward.__self__.weight is first
    assert first.dtype == torch.bfloat16


def test_after_the_block_the_model_is_as_it_was(routed):
    before = routed.model.state_dict()
    ids = torch.tensor([BATCH[0]])
    expected = routed.model(ids).logits
    with CastWeights(routed.model, torch.bfloat16).use():
        pass
    assert torch.equal(routed.model(ids).logits, expected)
    after = routed.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    maps = [module for module in routed.model.modules() if isinstance(module, torch.nn.Linear)]
    assert not any("forward" in module.__dict__ for module in maps)


def test_maps_that_are_trained_or_overridden_are_left_alone(routed):
    maps = list_frozen_maps(routed.model, torch.bfloat16)
    trained, overridden = maps[:2]
    trained.requires_grad_(True)
    overridden.forward = overridden.forward
    assert list_frozen_maps(routed.model, torch.bfloat16) == maps[2:]
