"""Paths in any order, many in a pass, against plain models whose layer list is the path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from drllm.models.base.layers import find_layers
from drllm.models.routing.policies import FullPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Question

SUM_TOLERANCE = 1e-4
"""Nats, as in the parity tests of scoring."""

QUESTIONS = [
    Question([5, 6, 7, 8, 9], [[10], [11, 12, 13], [14, 15]]),
    Question([20, 21], [[30, 31, 32, 33], [34], [35], [36, 37]]),
]
PATHS = [
    (0, 1, 2, 3, 4, 5),
    (0, 1, 2, 3, 2, 3, 4, 5),
    (5, 0, 3),
    (0, 1, 2, 3, 1, 2, 3, 4, 5),
    (2, 2, 2),
    (0, 1, 2, 3, 4, 5, 0, 1),
    (0, 1, 2),
]


def alone(model, path):
    """Score every option in a row of its own, without padding."""
    plain = copy.deepcopy(model)
    stack, layers = find_layers(plain)
    name = next(name for name, child in stack.named_children() if child is layers)
    setattr(stack, name, nn.ModuleList([layers[layer] for layer in path]))
    for key in ("layer_types", "no_rope_layers"):
        if getattr(plain.config, key, None) is not None:
            setattr(plain.config, key, [getattr(plain.config, key)[layer] for layer in path])
    plain.config.num_hidden_layers = len(path)
    found = []
    for question in QUESTIONS:
        num, sums = len(question.context), []
        for option in question.continuations:
            row = torch.tensor([[*question.context, *option]])
            with torch.no_grad():
                logprobs = plain(row, use_cache=False).logits[0].log_softmax(-1)
            sums.append(sum(float(logprobs[i - 1, row[0, i]]) for i in range(num, row.shape[1])))
        found.append(sums)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("paths_per_pass", [1, 3, 100])
def test_scores_equal_those_of_each_path_alone(tiny_model, family, paths_per_pass):
    model = tiny_model(family)
    expected = [alone(model, path) for path in PATHS]
    batch = ChoiceBatch(RoutedModel(model), QUESTIONS, 1.0)
    found = batch.path_logprobs(PATHS, paths_per_pass=paths_per_pass)
    for slow, fast in zip(expected, found, strict=True):
        for slow_sums, fast_sums in zip(slow, fast, strict=True):
            assert fast_sums == pytest.approx(slow_sums, abs=SUM_TOLERANCE)


def test_the_beginnings_of_a_pass_are_run_once(tiny_llama):
    model = tiny_llama()
    routed = RoutedModel(model)
    batch, runs = ChoiceBatch(routed, QUESTIONS, 1.0), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: runs.append(1))
    batch.path_logprobs(PATHS, paths_per_pass=len(PATHS))
    beginnings = {path[:length] for path in PATHS for length in range(1, len(path) + 1)}
    assert len(runs) == len(beginnings) < sum(map(len, PATHS))


def test_the_policy_in_force_and_the_last_route_stay(tiny_llama):
    routed = RoutedModel(tiny_llama())
    batch = ChoiceBatch(routed, QUESTIONS, 1.0)
    with routed.fixed([1, 0, 2, 1, 1, 1]):
        routed.model(torch.tensor([[5, 6]]))
        found = batch.path_logprobs([PATHS[0]])
    assert routed.last_route.tolist() == [[1, 0, 2, 1, 1, 1]]
    for base, along in zip(batch.routed_scores(FullPolicy())[0], found[0], strict=True):
        assert along == pytest.approx(base.logprobs, abs=SUM_TOLERANCE)
