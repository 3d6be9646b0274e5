"""Every family of the suite, under every plan, against the slow way; greedy, in a padded batch."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from drllm.model.prompts import pad_left
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.depth_control import run_prompts
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.policies import FixedPolicy, RecordingPolicy
from slow_way import LOGIT_TOLERANCE, answers, right_padded, stored_rows, tiny_routers

TELLING_ONLY = ("test_every_plan_gives_other_answers_so_that_a_mistake_would_show",)

generate = partial(answers, max_new_tokens=8, min_new_tokens=8)


def test_every_row_of_a_padded_batch_says_what_it_says_alone(slow, routed, prompts, family, plan):
    with routed.fixed(plan):
        found = generate(routed, prompts)
    assert slow.greedy(family, plan) == found


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_the_slow_way_at_every_real_position_of_a_padded_batch(
    slow, routed, prompts, family, plan, side
):
    ids, mask = pad_left(prompts, "cpu") if side == "left" else right_padded(prompts)
    options = {}
    if side == "left":
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with routed.fixed(plan), torch.no_grad():
        logits = routed.model(ids, attention_mask=mask, **options).logits
    for row, (decisions, prompt) in enumerate(zip(plan, prompts, strict=True)):
        expected = slow.listed(family, decisions).logits(prompt)
        found = logits[row, mask[row].bool()]
        torch.testing.assert_close(expected, found, atol=LOGIT_TOLERANCE, rtol=0)


def test_all_execute_is_bit_identical_to_the_untouched_model(slow, prompts, family):
    model = slow.untouched(family)
    ids, mask = pad_left(prompts, "cpu")
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        said = generate(model, prompts)
        routed = RoutedModel(model)
        assert torch.equal(logits, routed.model(ids, attention_mask=mask).logits)
        assert said == generate(routed, prompts)


def test_routers_decide_once_and_their_route_holds_while_decoding(slow, prompts, family):
    routed = RoutedModel(slow.untouched(family), tiny_routers(seed=3, spread=6.0))
    found = generate(routed, prompts)
    route = routed.last_route.tolist()
    assert len({tuple(decisions) for decisions in route}) > 1
    assert {0, 1, 2} == {value for decisions in route for value in decisions}
    assert slow.greedy(family, route) == found


def test_features_of_a_prompt_are_the_same_alone_and_in_a_padded_batch(routed, prompts, family):
    """Learned positions (GPT-2) count the real tokens, wherever padding puts them."""
    together = RecordingPolicy(FixedPolicy([1, 2, 0, 1, 1, 1], 6), 4)
    run_prompts(routed, together, prompts)
    for row, prompt in enumerate(prompts):
        alone = RecordingPolicy(FixedPolicy([1, 2, 0, 1, 1, 1], 6), 4)
        run_prompts(routed, alone, [prompt])
        torch.testing.assert_close(
            alone.means[0], together.means[row], atol=LOGIT_TOLERANCE, rtol=1e-4
        )


def test_stored_kv_rows_equal_the_plan(routed, prompts, family, plan):
    ids, mask = pad_left(prompts, "cpu")
    cache = DynamicCache(config=routed.model.config)
    with routed.fixed(plan), torch.no_grad():
        routed.model(
            ids, attention_mask=mask, use_cache=True, **{cache_argument(routed.model): cache}
        )
    assert sum(map(sum, plan)) == stored_rows(cache)


def test_detach_restores_the_model_exactly(slow, prompts, family):
    model = slow.untouched(family)
    ids, mask = pad_left(prompts, "cpu")
    modules = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        routed = RoutedModel(model)
        with routed.fixed([2, 0, 1, 0, 2, 1]):
            generate(routed, prompts)
        assert model is routed.detach()
        assert {name: set(value) for name, value in modules.items()} == {
            name: set(module.__dict__) for name, module in model.named_modules()
        }
        assert torch.equal(logits, model(ids, attention_mask=mask).logits)


def test_every_plan_gives_other_answers_so_that_a_mistake_would_show(slow, prompts, family):
    plans = [[1] * 6, [0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0], [1, 2, 1, 1, 2, 1], [2] * 6]
    said = [slow.greedy(family, [plan] * len(prompts)) for plan in plans]
    for row in range(len(prompts)):
        assert len(plans) == len({tuple(answers[row]) for answers in said})
    tokens = {token for answers in said for answer in answers for token in answer}
    assert len(tokens) > 20
