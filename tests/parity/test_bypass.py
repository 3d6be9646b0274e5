"""A model with a bypass against the slow way: one plain text at a time, token by token."""

import itertools

import pytest
import torch
from transformers import DynamicCache

from drllm.errors import CheckpointError, RoutingError
from drllm.model.load import BaseModel, load
from drllm.model.prompts import pad_left
from drllm.models.routed_model import RoutedModel, attach, detach
from drllm.models.routers.checkpoint import save_routers
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.bypass import Bypass
from drllm.models.scoring.score import Request, Scorer, score
from drllm.paths import StaticPath
from slow_way import (
    FULL,
    LOGIT_TOLERANCE,
    QUESTIONS,
    SUM_TOLERANCE,
    ListedModel,
    MappedModel,
    answers,
    routers_for,
    said_to_slide,
)

NUM_LAYERS = 6
RANK = 3
PROMPTS = [[5, 6, 7, 8, 9], [20, 21], [40, 41, 42, 43, 44, 45, 46]]
MIXED = [(1, 1, 0, 0, 1, 1), (1, 0, 2, 1, 0, 1), (0, 1, 1, 1, 1, 0)]
"""A row of decisions for each prompt: gaps inside, with a repeat, and at both ends."""
PLANS = [
    FULL,
    *MIXED,
    (1, 0, 0, 0, 0, 0),
    StaticPath([0, 1, 4, 4, 2, 3, 5]),  # goes back
]
STEM = [60, 61, 62, 63, 64, 65, 66, 67]
KL_TOLERANCE = 1e-4
REQUESTS = {
    "options": QUESTIONS,
    "options after a common beginning": [
        Request([*STEM, *item.context], item.continuations) for item in QUESTIONS
    ],
    "texts": [Request.from_text(text) for text in PROMPTS],
    "prompts": [Request(text) for text in PROMPTS],
    "prompts after a common beginning": [Request([*STEM, *text]) for text in PROMPTS],
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [2]}
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma3_text", "qwen3")


def random_bypass(width, num_layers=NUM_LAYERS):
    generator = torch.Generator().manual_seed(0)

    def draw(size, *shape):
        return size * torch.randn(*shape, generator=generator)

    return Bypass(
        draw(0.3, num_layers, RANK, width),
        draw(0.3, num_layers, width, RANK),
        draw(0.2, num_layers, width),
        draw(1.0, num_layers, width),
    )


class BypassAlone:
    """The same maps, for one whole text at a time, written out."""

    def __init__(self, bypass):
        self.bypass = bypass

    def cross_alone(self, gap, states):
        for layer in range(gap.layer + 1, gap.next_layer):
            states = torch.stack(list(self.skip_alone(layer, states)))
        return states

    def skip_alone(self, layer, states):
        for position, state in enumerate(states):
            if position == 0:
                yield state + self.bypass.first[layer]
                continue
            normal = state / float(state.square().mean()) ** 0.5
            inner = self.bypass.down[layer] @ normal
            yield state + self.bypass.up[layer] @ inner + self.bypass.bias[layer]


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model):
    return tiny_model(request.param)


@pytest.fixture
def llama(tiny_llama):
    return tiny_llama()


def mapped(model, plan, bypass):
    """Return the slow way for one plan; `model` isn't routed."""
    return MappedModel(model, plan, BypassAlone(bypass))


def width_of(model):
    return model.config.get_text_config().hidden_size


def test_each_row_of_a_padded_batch_says_what_it_says_alone(model):
    bypass = random_bypass(width_of(model))
    expected = [
        mapped(model, plan, bypass).logits(prompt)[-1]
        for plan, prompt in zip(MIXED, PROMPTS, strict=True)
    ]
    routed = RoutedModel(model, bypass=bypass)
    ids, mask = pad_left(PROMPTS, "cpu")
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with routed.fixed(MIXED), torch.no_grad():
        found = routed(**inputs, use_cache=False).logits[:, -1]
    assert torch.allclose(found, torch.stack(expected), atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_plan_says_what_the_slow_way_says(llama, plan):
    bypass = random_bypass(width_of(llama))
    expected = mapped(llama, plan, bypass).logits(PROMPTS[0])
    routed = RoutedModel(llama, bypass=bypass)
    with routed.fixed(plan), torch.no_grad():
        found = routed(torch.tensor(PROMPTS[:1])).logits[0]
    assert torch.allclose(found, expected, atol=LOGIT_TOLERANCE)


WAYS = {
    "a cache": {},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "the prompt in chunks": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_batch_generates_what_each_row_generates_alone(model, way):
    bypass = random_bypass(width_of(model))
    expected = [
        mapped(model, plan, bypass).greedy(prompt, 6, never=2)
        for plan, prompt in zip(MIXED, PROMPTS, strict=True)
    ]
    routed = RoutedModel(model, bypass=bypass)
    with routed.fixed(MIXED):
        assert answers(routed.model, PROMPTS, **GREEDY, **way) == expected


def test_a_path_that_goes_back_generates_what_the_slow_way_generates(llama):
    bypass = random_bypass(width_of(llama))
    path = PLANS[-1]
    expected = [mapped(llama, path, bypass).greedy(prompt, 6, never=2) for prompt in PROMPTS]
    routed = RoutedModel(llama, bypass=bypass)
    with routed.fixed(path):
        assert answers(routed.model, PROMPTS, **GREEDY) == expected


def test_a_text_that_is_read_in_parts_has_one_first_token(llama):
    bypass = random_bypass(width_of(llama))
    plan = MIXED[0]
    text = PROMPTS[2]
    expected = mapped(llama, plan, bypass).logits(text)
    routed = RoutedModel(llama, bypass=bypass)
    cache = DynamicCache(config=llama.config)
    found = []
    with routed.fixed(plan), torch.no_grad():
        for start in range(0, len(text), 3):
            part = torch.tensor([text[start : start + 3]])
            found.append(routed(part, past_key_values=cache).logits[0])
    assert torch.allclose(torch.cat(found), expected, atol=LOGIT_TOLERANCE)


def score_alone(model, bypass, requests):
    """Return the sums of log-probabilities and the KL of each plan and request."""
    expected = []
    for plan in PLANS:
        alone = mapped(model, plan, bypass)
        for item in requests:
            full = ListedModel(model, FULL).logits(item.context).log_softmax(-1)
            logprobs = alone.logits(item.context).log_softmax(-1)
            kl = float((full.exp() * (full - logprobs)).sum(-1).mean())
            expected.append((alone.sums(item.context, item.continuations), kl))
    return expected


def assert_scores(outcomes, expected):
    for outcome, (sums, kl) in zip(itertools.chain(*outcomes), expected, strict=True):
        assert list(outcome.logprobs) == pytest.approx(sums, abs=SUM_TOLERANCE)
        assert outcome.kl == pytest.approx(kl, abs=KL_TOLERANCE)


@pytest.mark.parametrize("kind", REQUESTS)
def test_options_texts_and_kl_are_those_of_each_path_alone(llama, kind):
    bypass = random_bypass(width_of(llama))
    expected = score_alone(llama, bypass, REQUESTS[kind])
    routed = RoutedModel(llama, bypass=bypass)
    assert_scores(score(routed, REQUESTS[kind], PLANS, kl=True), expected)


@pytest.mark.parametrize("gigabytes", [0.0, 1.0])
def test_scores_do_not_depend_on_the_states_that_are_cached(llama, gigabytes):
    bypass = random_bypass(width_of(llama))
    requests = REQUESTS["options after a common beginning"]
    expected = score_alone(llama, bypass, requests)
    scorer = Scorer(RoutedModel(llama, bypass=bypass), requests, gigabytes, paths_per_pass=2)
    for _ in range(2):  # the second time most states are cached
        outcomes = []
        for plan in PLANS:
            pairs = [(place, plan) for place in range(len(requests))]
            outcomes.append(scorer.score(pairs, kl=True))
        assert_scores(outcomes, expected)


def test_a_model_that_reads_each_continuation_in_a_row_of_its_own(llama):
    bypass = random_bypass(width_of(llama))
    expected = score_alone(llama, bypass, QUESTIONS)
    routed = RoutedModel(said_to_slide(llama), bypass=bypass)
    assert_scores(score(routed, QUESTIONS, PLANS, kl=True), expected)


def test_generated_answers_are_those_of_each_path_alone(llama, tiny_tokenizer):
    bypass = random_bypass(width_of(llama))
    requests = [Request(prompt, max_new_tokens=5) for prompt in PROMPTS]
    expected = []
    for plan in MIXED:
        alone = mapped(llama, plan, bypass)
        expected.append([alone.greedy(prompt, 5) for prompt in PROMPTS])
    routed = RoutedModel(llama, tokenizer=tiny_tokenizer, bypass=bypass)
    outcomes = score(routed, requests, MIXED)
    assert any(outcome.tokens for row in outcomes for outcome in row)
    for row, row_tokens in zip(outcomes, expected, strict=True):
        for outcome, tokens in zip(row, row_tokens, strict=True):
            assert list(outcome.tokens) == tokens[: len(outcome.tokens)]


def test_routers_decide_on_the_states_that_the_bypass_leaves(llama):
    bypass = random_bypass(width_of(llama))
    routers = routers_for(llama, bypass=bypass.sha256)
    routed = attach(llama, routers, bypass=bypass)
    with torch.no_grad():
        found = routed(torch.tensor(PROMPTS[:1])).logits[0]
    route = tuple(routed.last_route[0].tolist())
    assert 0 in route
    detach(routed)
    assert torch.allclose(found, mapped(llama, route, bypass).logits(PROMPTS[0]), atol=1e-4)


def test_the_full_path_and_a_disabled_model_are_the_base_model_bit_for_bit(llama):
    inputs = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        expected = llama(inputs).logits
        routed = RoutedModel(llama, bypass=random_bypass(width_of(llama)))
        assert torch.equal(routed(inputs).logits, expected)
        with routed.fixed(MIXED[0]), routed.disabled():
            assert torch.equal(routed(inputs).logits, expected)


def test_a_bypass_of_another_shape_is_refused_and_the_model_stays_as_it_was(llama):
    for wrong in (random_bypass(width_of(llama), 5), random_bypass(8)):
        with pytest.raises(RoutingError, match="this bypass is for a model of"):
            RoutedModel(llama, bypass=wrong)
    RoutedModel(llama)


def test_gradients_flow_after_a_pass_in_inference_mode(llama):
    """In float64, where the maps are copied, as they are to a GPU."""
    routed = RoutedModel(llama.double(), bypass=random_bypass(width_of(llama)))
    llama.requires_grad_(True)
    with routed.fixed(MIXED[0]):
        with torch.inference_mode():
            expected = routed(torch.tensor(PROMPTS[:1])).logits
        logits = routed(torch.tensor(PROMPTS[:1])).logits
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert llama.model.embed_tokens.weight.grad.isfinite().all()


def test_the_maps_run_in_float32_under_autocast():
    bypass = random_bypass(16)
    states = torch.randn(2, 5, 16)
    expected = bypass.skip(1, states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bypass.skip(1, states), expected)


def test_what_is_loaded_with_a_bypass_is_attached_with_it(llama, tiny_tokenizer):
    bypass = random_bypass(width_of(llama))
    base = BaseModel(llama, tiny_tokenizer, "tiny", bypass=bypass)
    assert attach(base).bypass is bypass
    other = random_bypass(width_of(llama))
    assert attach(base, bypass=other).bypass is other


def test_routers_are_loaded_with_the_bypass_that_they_were_trained_with(model_folder, tmp_path):
    base = load(str(model_folder()), device="cpu")
    width = base.model.config.hidden_size
    bypass = random_bypass(width, base.num_layers)
    config = RouterConfig(num_layers=base.num_layers, hidden_size=width, bypass=bypass.sha256)
    save_routers(RouterStack(config), tmp_path)
    with pytest.raises(CheckpointError, match="trained with"):
        RoutedModel.from_pretrained(tmp_path, base)
    routed = RoutedModel.from_pretrained(tmp_path, base, bypass=bypass)
    assert routed.bypass is bypass
