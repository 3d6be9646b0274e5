"""What must hold on real weights: SmolLM2-135M-Instruct, float32, real questions."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from drllm.models.prompts import encode, left_padded
from drllm.models.routed import RoutedModel
from drllm.paths import to_path
from drllm.search.evaluator import BlockEvaluator
from drllm.tasks.base import get_task

NUM_NEW = 8
EXACT = 1e-9
"""Nats between the two ways in float64, where next to no arithmetic noise is left."""
NOISE = 5e-4
"""Nats that float32 costs: paths without an early layer are badly conditioned. On this sample the
shared way is up to 2.4e-4 from the float64 value, plain one-by-one scoring up to 5e-5; on paths
that keep layers 0 to 2 both stay below 5e-5."""


def plans(num_layers, num, seed=0):
    """Return plans a search would meet: the full path and a few edits of it."""
    rng = random.Random(seed)
    drawn = [[1] * num_layers]
    while len(drawn) < num:
        plan = [1] * num_layers
        for layer in rng.sample(range(num_layers), rng.randint(1, 5)):
            plan[layer] = rng.choice([0, 0, 2])
        drawn.append(plan)
    return drawn


def listed(model, decisions):
    """Return a model whose layer list is the path; the layers themselves are shared, not copied."""
    plain = copy.copy(model)
    plain._modules = dict(model._modules)
    plain.model = copy.copy(model.model)
    plain.model._modules = dict(model.model._modules)
    plain.config = plain.model.config = copy.deepcopy(model.config)
    path = to_path(decisions)
    plain.model.layers = nn.ModuleList([model.model.layers[index] for index in path])
    plain.config.num_hidden_layers = len(path)
    return plain


@pytest.fixture(scope="module")
def facts():
    task = get_task("builtin_facts")
    return task, task.examples("test")


def test_a_padded_batch_of_different_plans_generates_what_each_row_does_alone(smollm2, facts):
    task, examples = facts
    prompts = [task.prompt(example, "loglikelihood").text for example in examples[:4]]
    rows = [encode(smollm2.tokenizer, text) for text in prompts]
    chosen = plans(30, len(rows))
    expected = []
    with torch.no_grad():
        for row, plan in zip(rows, chosen, strict=True):
            slow, tokens = listed(smollm2.model, plan), list(row)
            for _ in range(NUM_NEW):
                logits = slow(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                logits[smollm2.tokenizer.eos_token_id] = -torch.inf
                tokens.append(int(logits.argmax()))
            expected.append(tokens[len(row) :])
    routed = RoutedModel(smollm2.model)
    ids, mask = left_padded(rows, "cpu")
    with routed.fixed(chosen):
        output = routed.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=NUM_NEW,
            min_new_tokens=NUM_NEW,
            do_sample=False,
        )
    routed.detach()
    assert expected == output[:, ids.shape[1] :].tolist()


def slow_margins(base, pairs, asked):
    """Score every path alone, choice by choice, in the model's own precision."""
    margins = []
    with torch.no_grad():
        for place, plan in pairs:
            slow, prompt, sums = listed(base.model, plan), asked[place], []
            context = encode(base.tokenizer, prompt.text)
            for continuation in prompt.continuations:
                row = encode(base.tokenizer, prompt.text + continuation)
                logprobs = slow(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
                sums.append(
                    sum(float(logprobs[i - 1, row[i]]) for i in range(len(context), len(row)))
                )
            gold = sums.pop(prompt.gold)
            margins.append(gold - max(sums))
    return margins


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, NOISE)], ids=["f64", "f32"]
)
def test_shared_packed_scores_give_the_verdict_and_margin_of_each_path_alone(
    smollm2, facts, dtype, tolerance
):
    task, examples = facts
    asked = [task.prompt(example, "loglikelihood") for example in examples[:2]]
    pairs = [
        (place, tuple(plan)) for place in range(len(asked)) for plan in plans(30, 3, seed=place)
    ]
    smollm2.model.to(dtype)
    try:
        expected = slow_margins(smollm2, pairs, asked)
        routed = RoutedModel(smollm2.model, tokenizer=smollm2.tokenizer)
        outcomes = BlockEvaluator(routed, asked, 1.0).evaluate(pairs)
        routed.detach()
    finally:
        smollm2.model.to(torch.float32)  # exact: every float32 is a float64
    assert expected == pytest.approx([o.margin for o in outcomes], abs=tolerance)
    assert [margin > 0 for margin in expected] == [outcome.reward == 1 for outcome in outcomes]


def test_all_execute_is_bit_identical_to_the_untouched_model(smollm2):
    ids = torch.tensor([encode(smollm2.tokenizer, "Gravity is")])
    with torch.no_grad():
        before = smollm2.model(ids).logits
        routed = RoutedModel(smollm2.model)
        under_routing = routed.model(ids).logits
        routed.detach()
        after = smollm2.model(ids).logits
    assert torch.equal(before, under_routing)
    assert torch.equal(before, after)
