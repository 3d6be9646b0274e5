"""Logistic regression: what it makes least, what it reads, and which penalty it chooses."""

import pytest
import torch

from drllm.models.routers.logistic import fit_logistic

N, D, L = 200, 24, 10


@pytest.fixture(scope="module")
def examples():
    """Prompts of three kinds, each with decisions of its own, by small inputs far from 0."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(3, (N,), generator=generator)
    shares = torch.tensor([0.3, 0.6, 0.1])
    plans = torch.multinomial(shares, 3 * L, replacement=True, generator=generator).view(3, L)
    inputs = 0.02 * torch.randn(N, D, generator=generator)
    inputs[:, :3] += 0.1 * torch.eye(3)[kinds]
    return 1.0 + inputs, plans[kinds]


def nothing_foretells(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (number, L), generator=generator)
    return torch.randn(number, D, generator=generator), labels


def cross_entropy(linear, inputs, labels):
    logits = linear(inputs).view(-1, 3)
    return float(torch.nn.functional.cross_entropy(logits, labels.flatten()))


def test_the_map_is_where_the_penalised_weighted_loss_is_flat():
    inputs, labels = nothing_foretells(40)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1))
    result = fit_logistic(3 + inputs / 50, labels, 3, weights=weights, penalty=0.1)
    scaled = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0, correction=0)
    deviation = (inputs / 50).std(dim=0, correction=0)
    weight = (result.weight * deviation).requires_grad_()
    bias = (result.bias + result.weight @ (3 + inputs / 50).mean(dim=0)).requires_grad_()
    loss = 0.1 / 2 * (weight**2).sum()
    for row in range(40):
        logits = (weight @ scaled[row] + bias).view(L, 3)
        for layer in range(L):
            share = weights[row] / weights.sum()
            loss = loss - share * logits[layer].log_softmax(0)[labels[row, layer]]
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-4
    assert float(bias.grad.abs().max()) < 1e-4
    assert float(weight.detach().abs().max()) > 0.1


def test_examples_of_weight_0_say_nothing():
    inputs, labels = nothing_foretells(40)
    weights = (torch.arange(40) < 30).float()
    others = torch.cat([labels[:30], (labels[30:] + 1) % 3])
    for penalty in (0.1, None):
        one, other = (
            fit_logistic(inputs, classes, 3, weights=weights, penalty=penalty)
            for classes in (labels, others)
        )
        assert torch.equal(one.weight, other.weight)


def test_an_input_that_never_varies_is_not_read(examples):
    inputs, labels = examples[0].clone(), examples[1]
    inputs[:, 2] = 0.1
    assert not fit_logistic(inputs, labels, 3, penalty=1.0).weight[:, 2].any()


def test_decisions_that_follow_from_the_inputs_are_learned(examples):
    inputs, labels = examples
    result = fit_logistic(inputs[:150], labels[:150], 3)(inputs[150:]).view(50, L, 3).argmax(dim=-1)
    assert float((result == labels[150:]).double().mean()) > 0.95


def test_the_penalty_is_one_that_does_well_on_examples_held_out(examples):
    inputs, labels = nothing_foretells(60)
    fresh = nothing_foretells(500, seed=1)
    weak = fit_logistic(inputs, labels, 3, penalty=0.01)
    picked = fit_logistic(inputs, labels, 3)
    assert cross_entropy(picked, *fresh) < 0.5 * cross_entropy(weak, *fresh)
    strong = fit_logistic(*examples, 3, penalty=3.0)
    picked = fit_logistic(*examples, 3)
    assert cross_entropy(picked, *examples) < 0.5 * cross_entropy(strong, *examples)


@pytest.mark.parametrize("number", [1, 2, 7])
def test_few_examples_that_all_decide_alike_give_a_map_that_does_so(number):
    inputs, labels = nothing_foretells(number)
    result = fit_logistic(inputs, torch.ones_like(labels), 3)
    assert result(inputs).isfinite().all()
    assert (result(inputs).view(number, L, 3).argmax(dim=-1) == 1).all()


def test_the_same_examples_give_the_same_map_and_no_global_draw_is_used(examples):
    before = torch.get_rng_state()
    one, other = (fit_logistic(*examples, 3) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(before, torch.get_rng_state())
