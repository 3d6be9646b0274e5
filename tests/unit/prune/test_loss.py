"""The loss that is learned, against plain forward passes of one answer at a time."""

import pytest
import torch
import torch.nn.functional as F

from drllm.model.submodel import shorten
from drllm.prune import loss
from drllm.prune.loss import SHARPNESS, Item, compute_losses, lay_out, make_text_item
from drllm.prune.measure import measure_answer
from drllm.prune.repairs.lora import measure_loss

ITEMS = {
    "options": Item((5, 6, 7, 8), ((9,), (10, 11, 12), (13, 14)), 1, (3, 7, 5)),
    "options that share a beginning": Item((20, 21), ((22, 23), (22, 24)), 0, (4, 4)),
    "an answer in text": Item((30, 31, 32), ((33, 34, 35, 36),)),
    "one token of text": Item((37,), ((38,),)),
    "unscored beginnings": Item((40, 41), ((50, 43, 44), (51, 52, 43, 44)), 1, (9, 9), (1, 2)),
    "a text": make_text_item((60, 61, 62, 63, 64)),
    "a prompt with the full model's answer": make_text_item((65, 66, 67, 68), 3),
}
FAMILIES = {
    "llama": {},
    "gemma3_text": {},  # a window of 8 tokens
    "gemma3_text, wide": {"sliding_window": 200},
    "gpt2": {},
    "falcon": {"alibi": True},
    "bloom": {},
}
PACKED = {"llama", "gemma3_text, wide", "gpt2"}


@pytest.fixture(params=FAMILIES)
def models(request, tiny_model):
    """The name of a family, its shortened model and its full one."""
    full = tiny_model(request.param.partition(",")[0], **FAMILIES[request.param])
    short = shorten(full, [2, 3])
    return request.param, short, full


def compute_logprobs(model, tokens):
    """Return the log-probabilities of the next token, by a plain pass without padding."""
    return model(torch.tensor([tokens])).logits[0].float().log_softmax(dim=-1)


def compute_slowly(student, teacher, item):
    """Return the loss of one question or text, an answer at a time."""
    if item.is_text:
        tokens = (*item.context, *item.answers[0])
        found = compute_logprobs(student, tokens)[:-1]
        with torch.no_grad():
            expected = compute_logprobs(teacher, tokens)[:-1]
        return (expected.exp() * (expected - found)).sum(dim=1).mean()
    scores = []
    for place, answer in enumerate(item.answers):
        logprobs = compute_logprobs(student, (*item.context, *answer))
        first = item.num_unscored[place] if item.num_unscored else 0
        by_token = [
            logprobs[len(item.context) + number - 1, token] for number, token in enumerate(answer)
        ]
        scores.append(torch.stack(by_token[first:]))
    result = -scores[item.gold].mean()
    if item.lengths:
        by_character = torch.stack(
            [score.sum() / length for score, length in zip(scores, item.lengths, strict=True)]
        )
        result = result + F.cross_entropy(SHARPNESS * by_character, torch.tensor(item.gold))
    return result


def find_gradients(student, losses):
    """Return the gradients of the sum of some losses by the student's weights."""
    weights = [weight for weight in student.parameters() if weight.is_floating_point()]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(torch.stack(losses()).sum(), weights, allow_unused=True)
    for weight in weights:
        weight.requires_grad_(False)
    return gradients


def assert_same_gradients(found, expected):
    for own, other in zip(found, expected, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ITEMS)
def test_each_loss_is_that_of_plain_passes(models, name):
    _, short, full = models
    with torch.no_grad():
        [found] = compute_losses(short, full, [ITEMS[name]])
        expected = compute_slowly(short, full, ITEMS[name])
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_all_questions_of_a_step_together_have_the_losses_and_gradients_of_plain_passes(models):
    _, short, full = models
    items = list(ITEMS.values())
    found = find_gradients(short, lambda: compute_losses(short, full, items))
    expected = find_gradients(short, lambda: [compute_slowly(short, full, item) for item in items])
    assert_same_gradients(found, expected)
    with torch.no_grad():
        losses = torch.stack(compute_losses(short, full, items))
        slow = torch.stack([compute_slowly(short, full, item) for item in items])
    torch.testing.assert_close(losses, slow, rtol=1e-4, atol=1e-5)


def test_a_row_is_shared_where_the_attention_takes_a_mask_and_the_window_is_wide(models):
    family, short, _ = models
    items = list(ITEMS.values())
    layout = lay_out(items, short)
    is_packed = len(layout.ids) == 1
    assert is_packed == (family in PACKED)
    if is_packed:
        assert layout.ids.numel() == sum(item.num_tokens for item in items)


def test_one_row_has_the_losses_and_gradients_of_a_row_for_each_answer(tiny_llama, monkeypatch):
    full = tiny_llama()
    short = shorten(full, [2, 3])
    items = list(ITEMS.values())
    packed = find_gradients(short, lambda: compute_losses(short, full, items))
    packed_losses = compute_losses(short, full, items)
    monkeypatch.setattr(loss, "can_pack", lambda model, length: False)
    assert len(lay_out(items, short).ids) == sum(len(item.answers) for item in items)
    torch.testing.assert_close(compute_losses(short, full, items), packed_losses)
    alone = find_gradients(short, lambda: compute_losses(short, full, items))
    assert_same_gradients(packed, alone)


def test_the_check_is_the_mean_over_questions_plus_that_over_texts(models):
    _, short, full = models
    items = list(ITEMS.values()) * 2  # more than one batch
    with torch.no_grad():
        losses = {kind: [] for kind in (False, True)}
        for item in items:
            losses[item.is_text].append(float(compute_slowly(short, full, item)))
    expected = sum(sum(values) / len(values) for values in losses.values())
    assert measure_loss(short, full, items) == pytest.approx(expected, rel=0.02)  # maybe bfloat16


def test_the_measured_loss_of_an_answer_is_that_of_the_right_one_alone(models):
    _, short, full = models
    item = ITEMS["options"]
    with torch.no_grad():
        alone = compute_slowly(short, full, Item(item.context, (item.answers[item.gold],)))
    assert measure_answer(short, item) == pytest.approx(float(alone), rel=1e-4)
