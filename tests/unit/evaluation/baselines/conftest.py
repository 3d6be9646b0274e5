"""A tiny model of four layers, a few questions, and the slow way of scoring them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Question

NUM_LAYERS = 4

QUESTIONS = [
    Question([5, 6, 7, 8, 9], [[10], [11, 12, 13], [14, 15]]),
    Question([20, 21], [[30, 31, 32, 33], [34], [35], [36, 37]]),
    Question([40, 41, 42, 43, 44, 45, 46], [[50, 51], [52, 53]]),
    Question([60, 61, 62], [[70, 71], [72]]),
]
GOLDS = [2, 0, 1, 0]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    """The model that `routed` is made of, untouched."""
    return tiny_llama(num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def routed(tiny_llama: Callable[..., Any]) -> RoutedModel:
    return RoutedModel(tiny_llama(num_layers=NUM_LAYERS))


@pytest.fixture(scope="module")
def asked() -> list[tuple[Question, int]]:
    """The questions, each with its gold option."""
    return list(zip(QUESTIONS, GOLDS, strict=True))


@pytest.fixture(scope="module")
def batches(routed: RoutedModel) -> list[ChoiceBatch]:
    """The questions, in two batches."""
    return [ChoiceBatch(routed, QUESTIONS[:3], 1.0), ChoiceBatch(routed, QUESTIONS[3:], 1.0)]


@pytest.fixture(scope="module")
def golds() -> list[list[int]]:
    """The gold options of `batches`."""
    return [GOLDS[:3], GOLDS[3:]]


@pytest.fixture(scope="module")
def listed(model: Any) -> Callable[[Sequence[int]], Any]:
    """A function that returns a plain copy of the model whose layer list is a path."""

    def make(path: Sequence[int]) -> Any:
        plain = copy.deepcopy(model)
        plain.model.layers = nn.ModuleList([plain.model.layers[layer] for layer in path])
        plain.config.num_hidden_layers = len(path)
        return plain

    return make


@pytest.fixture(scope="module")
def slow_gold_logprob(listed: Callable[[Sequence[int]], Any]) -> Callable[[Sequence[int]], float]:
    """A function that measures a path: one question, one option at a time, without padding."""

    def measure(path: Sequence[int]) -> float:
        plain, total = listed(path), 0.0
        for question, gold in zip(QUESTIONS, GOLDS, strict=True):
            context, sums = list(question.context), []
            for option in question.continuations:
                row = [*context, *option]
                with torch.no_grad():
                    logprobs = plain(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
                sums.append(sum(logprobs[i - 1, row[i]] for i in range(len(context), len(row))))
            total += float(torch.stack(sums).log_softmax(0)[gold])
        return total / len(QUESTIONS)

    return measure
