"""A tiny model of four layers, a few questions, the slow way of scoring them, search records."""

import random
from types import SimpleNamespace

import pytest

import slow_way
from drllm.evaluation.baselines.material import Material
from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.score import Request
from slow_way import gold_logprob_alone

NUM_LAYERS = 4

QUESTIONS = [*slow_way.QUESTIONS, Request([60, 61, 62], [[70, 71], [72]])]
GOLDS = [2, 0, 1, 0]


@pytest.fixture(scope="module")
def model(tiny_llama):
    """The model that `routed` is made of, untouched."""
    return tiny_llama(num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def routed(tiny_llama):
    return RoutedModel(tiny_llama(num_layers=NUM_LAYERS))


@pytest.fixture(scope="session")
def some_prompts():
    """A function that returns prompts of 1 to 20 tokens, always the same ones."""

    def make(number: int) -> list[list[int]]:
        rng = random.Random(0)
        return [[rng.randrange(3, 101) for _ in range(rng.randint(1, 20))] for _ in range(number)]

    return make


@pytest.fixture(scope="session")
def material():
    """The questions, their prompts and gold options."""
    return Material(
        prompts=[each.context for each in QUESTIONS],
        questions=QUESTIONS,
        golds=GOLDS,
        name="own",
    )


@pytest.fixture(scope="session")
def without_a_model():
    """A function that makes a baseline that only knows the number of layers."""
    return lambda kind, num_layers: kind(SimpleNamespace(num_layers=num_layers), Material())


@pytest.fixture(scope="module")
def slow_gold_logprob(model):
    """A function that measures a path: one question, one option at a time, without padding."""
    return lambda path: gold_logprob_alone(model, path, QUESTIONS, GOLDS)
