"""Maps in the gaps of paths against the slow way: one plain text at a time, token by token."""

import itertools

import pytest
import torch

from drllm.errors import RoutingError
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.policies import FixedPolicy
from drllm.models.scoring.score import Request, Scorer, score
from drllm.paths import Gap, StaticPath, get_layers
from slow_way import (
    FULL,
    QUESTIONS,
    SUM_TOLERANCE,
    ListedModel,
    MappedModel,
    said_to_slide,
)

TELLING_ONLY = True

NUM_LAYERS = 6
KL_TOLERANCE = 1e-4
STEM = [60, 61, 62, 63, 64, 65, 66, 67]
PLANS = [
    FULL,
    (1, 1, 0, 1, 1, 1),
    (1, 1, 0, 0, 1, 1),
    (1, 0, 2, 1, 0, 1),
    (1, 1, 1, 1, 0, 0),  # the last layers are left out
    (0, 1, 1, 0, 1, 1),  # the first layer is left out
    (1, 0, 0, 0, 0, 0),
    StaticPath([0, 3, 2, 5]),  # goes back
]
TEXTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [40, 41, 42, 43, 44]]
REQUESTS = {
    "options": QUESTIONS,
    "options after a common beginning": [
        Request([*STEM, *question.context], question.continuations) for question in QUESTIONS
    ],
    "texts": [Request.from_text(text) for text in TEXTS],
    "prompts": [Request(text) for text in TEXTS],
    "prompts after a common beginning": [Request([*STEM, *text]) for text in TEXTS],
}


class RandomMaps:
    """A map of its own for each gap. It is a `Crossings`."""

    def __init__(self, width):
        generator = torch.Generator().manual_seed(0)
        self.maps = {}
        for layer, next_layer in itertools.combinations(range(-1, NUM_LAYERS + 1), 2):
            if next_layer > layer + 1:
                weight = 0.1 * torch.randn(width, width, generator=generator)
                bias = 0.3 * torch.randn(width, generator=generator)
                first = torch.randn(width, generator=generator)
                self.maps[Gap(layer, next_layer)] = (weight, bias, first)

    def cross(self, layer, next_layer, states, is_first):
        weight, bias, first = self.maps[layer, next_layer]
        rms = states.square().mean(dim=-1, keepdim=True).sqrt()
        changed = states + (states / rms) @ weight.T + bias
        return torch.where(is_first[..., None], states + first, changed)

    def cross_alone(self, gap, states):
        """Map the states of a text, token by token, `[T, D]`."""
        weight, bias, first = self.maps[gap]
        outputs = []
        for position, state in enumerate(states):
            rms = float(state.square().mean()) ** 0.5
            change = weight @ (state / rms) + bias
            outputs.append(state + (first if position == 0 else change))
        return torch.stack(outputs)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture
def maps(model):
    return RandomMaps(model.config.hidden_size)


def score_alone(model, maps, requests):
    """Return the sums of log-probabilities and the KL of each plan and request, `[N][P]`."""
    full = ListedModel(model, FULL)
    sums = []
    kls = []
    for plan in PLANS:
        mapped = MappedModel(model, plan, maps)
        sums.append([mapped.sums(item.context, item.continuations) for item in requests])
        kls.append([])
        for item in requests:
            expected = full.logits(item.context).log_softmax(-1)
            logprobs = mapped.logits(item.context).log_softmax(-1)
            kls[-1].append(float((expected.exp() * (expected - logprobs)).sum(-1).mean()))
    return sums, kls


def assert_scores(outcomes, expected):
    sums, kls = expected
    for row, row_sums, row_kls in zip(outcomes, sums, kls, strict=True):
        for outcome, outcome_sums, kl in zip(row, row_sums, row_kls, strict=True):
            assert list(outcome.logprobs) == pytest.approx(outcome_sums, abs=SUM_TOLERANCE)
            assert outcome.kl == pytest.approx(kl, abs=KL_TOLERANCE)


@pytest.mark.parametrize("kind", REQUESTS)
def test_options_texts_and_kl_are_those_of_each_path_alone(model, maps, kind):
    requests = REQUESTS[kind]
    expected = score_alone(model, maps, requests)
    outcomes = score(RoutedModel(model), requests, PLANS, kl=True, crossings=maps)
    assert_scores(outcomes, expected)


@pytest.mark.parametrize("gigabytes", [0.0, 1.0])
def test_scores_do_not_depend_on_the_states_that_are_cached(model, maps, gigabytes):
    requests = REQUESTS["options after a common beginning"]
    expected = score_alone(model, maps, requests)
    scorer = Scorer(RoutedModel(model), requests, gigabytes, paths_per_pass=2, crossings=maps)
    for _ in range(2):  # the second time most states are cached
        outcomes = []
        for plan in PLANS:
            pairs = [(place, plan) for place in range(len(requests))]
            outcomes.append(scorer.score(pairs, kl=True))
        assert_scores(outcomes, expected)


def test_a_model_that_reads_each_continuation_in_a_row_of_its_own(model, maps):
    requests = REQUESTS["options"]
    expected = score_alone(model, maps, requests)
    outcomes = score(RoutedModel(said_to_slide(model)), requests, PLANS, kl=True, crossings=maps)
    assert_scores(outcomes, expected)


def test_paths_of_other_calls_are_not_changed(model, maps):
    requests = REQUESTS["options after a common beginning"]
    expected = []
    for plan in PLANS:
        alone = ListedModel(model, path=get_layers(plan))
        expected.append([alone.sums(item.context, item.continuations) for item in requests])
    routed = RoutedModel(model)
    plain = score(routed, requests, PLANS, kl=True)
    score(routed, requests, PLANS, kl=True, crossings=maps)
    assert score(routed, requests, PLANS, kl=True) == plain
    for row, row_sums in zip(plain, expected, strict=True):
        for outcome, sums in zip(row, row_sums, strict=True):
            assert list(outcome.logprobs) == pytest.approx(sums, abs=SUM_TOLERANCE)


def test_what_crossings_cannot_be_combined_with(model, maps, tiny_tokenizer):
    routed = RoutedModel(model, tokenizer=tiny_tokenizer)
    with pytest.raises(RoutingError, match="answers can't be generated with crossings"):
        score(routed, [Request([5, 6], max_new_tokens=2)], [FULL], crossings=maps)
    scorer = Scorer(routed, QUESTIONS, crossings=maps)
    with pytest.raises(RoutingError, match="a policy can't run with crossings"):
        scorer.score_under_policy(FixedPolicy(FULL, NUM_LAYERS))
