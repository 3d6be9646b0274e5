"""What must hold on real weights: SmolLM2-135M-Instruct, float32, real questions."""

import random

import pytest
import torch

from drllm.model.prompts import encode
from drllm.models.routed_model import RoutedModel
from drllm.search.evaluator import Evaluator
from drllm.tasks.registry import get_task
from slow_way import ListedModel, answers

EXACT = 1e-9
"""Nats between the two ways in float64, where next to no arithmetic noise is left."""
NOISE = 5e-4
"""Nats that float32 costs: paths without an early layer are badly conditioned. On this sample the
shared way is up to 2.4e-4 from the float64 value, plain one-by-one scoring up to 5e-5; on paths
that keep layers 0 to 2 both stay below 5e-5."""
TIE = 3e-4
"""Nats by which one token may lie behind another and still be said in its place. On the 32 rows
below a batch moves the difference of the two best tokens by up to 1.9e-4, by less than 7e-5 on all
but two of them. No token flips there: the closest call is at 2.1e-3."""


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


@pytest.fixture(scope="module")
def facts():
    task = get_task("builtin_facts")
    return task, task.examples("test")


def various_plans(num_layers, num):
    """Return different plans: those a search would meet, and up to half of them wild ones."""
    wild = [
        [0] + [1] * (num_layers - 1),
        [1, 0] * (num_layers // 2),
        [2] * num_layers,
        [0] * (num_layers - 1) + [1],
        [2] + [1] * (num_layers - 1),
        [1] * (num_layers - 10) + [0] * 10,
        [1] * 10 + [2] * (num_layers - 20) + [0] * 10,
    ][: num // 2]
    chosen = plans(num_layers, num - len(wild)) + wild
    assert len(set(map(tuple, chosen))) == num
    return chosen


def flips(base, row, plan, answer):
    """Return where the plain model of one row's path says another token, and by what margin.

    The model lists the path's layers and runs the prompt and the whole answer at once, unpadded
    and without a cache. Where it says the answer's token at every place, the answer is what greedy
    decoding one by one gives; where it doesn't, it is asked how the answer's own beginning goes
    on. The margin is how many nats the answer's token lies behind.
    """
    logits = ListedModel(base.model, plan).logits(row + answer)[len(row) - 1 : -1]
    logits[:, base.tokenizer.eos_token_id] = -torch.inf  # as min_new_tokens does
    behind = logits.max(dim=-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return {place: margin for place, margin in enumerate(behind.tolist()) if margin > 0}


@pytest.mark.parametrize(
    ("num", "num_new"), [(8, 8), pytest.param(32, 64, marks=pytest.mark.thorough)]
)
def test_a_batch_of_different_prompts_and_plans_generates_what_each_row_does_alone(
    smollm2, facts, record_property, num, num_new
):
    task, examples = facts
    texts = [task.prompt(example, "loglikelihood").text for example in examples[::8][:num]]
    rows = [encode(smollm2.tokenizer, text) for text in texts]
    assert len(set(texts)) == num
    assert len(set(map(len, rows))) > 1  # so that some are padded
    chosen = various_plans(30, num)
    routed = RoutedModel(smollm2.model)
    try:
        with routed.fixed(chosen):
            said = answers(routed, rows, max_new_tokens=num_new, min_new_tokens=num_new)
    finally:
        routed.detach()
    found = [flips(smollm2, *alone) for alone in zip(rows, chosen, said, strict=True)]
    flipped = {place: margins for place, margins in enumerate(found) if margins}
    record_property("rows_flipped", len(flipped))
    assert [place for place, margins in flipped.items() if max(margins.values()) > TIE] == [], (
        f"rows that say another token than alone, by place and margin in nats: {flipped}"
    )
    assert len(flipped) <= num // 8
    # The ruler is fine enough: another row's plan would have been told from a row's own.
    for row, plan, answer in zip(rows[:4], chosen[1:5], said[:4], strict=True):
        assert max(flips(smollm2, row, plan, answer).values(), default=0.0) > 100 * TIE


def slow_margins(base, pairs, asked):
    """Score every path alone, choice by choice, in the model's own precision."""
    margins = []
    for place, plan in pairs:
        prompt = asked[place]
        context = encode(base.tokenizer, prompt.text)
        rows = [encode(base.tokenizer, prompt.text + each) for each in prompt.continuations]
        sums = ListedModel(base.model, plan).sums(context, [row[len(context) :] for row in rows])
        gold = sums.pop(prompt.gold)
        margins.append(gold - max(sums))
    return margins


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, EXACT, id="f64", marks=pytest.mark.thorough),
        pytest.param(torch.float32, NOISE, id="f32"),
    ],
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
        outcomes = Evaluator(routed, asked, 1.0).evaluate(pairs)
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
