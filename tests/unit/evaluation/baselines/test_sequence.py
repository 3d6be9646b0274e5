from __future__ import annotations

import math

import pytest
import torch

from drllm.evaluation.baselines.fitting.sequence_router import train_sequence_router
from drllm.evaluation.baselines.fitting.training import FitSettings

N, D, L = 200, 24, 10


def examples(seed=0):
    """Prompts of three kinds, each with decisions of its own."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(3, (N,), generator=generator)
    plans = torch.multinomial(
        torch.tensor([0.3, 0.6, 0.1]), 3 * L, replacement=True, generator=generator
    ).view(3, L)
    inputs = 0.02 * torch.randn(N, D, generator=generator)
    inputs[:, :3] += 0.1 * torch.eye(3)[kinds]
    return inputs, plans[kinds]


def test_decisions_that_follow_from_the_prompt_are_learned():
    inputs, labels = examples()
    router = train_sequence_router(inputs[:150], labels[:150])
    found = router.plans(inputs[150:], 0.0)
    assert float((found == labels[150:]).double().mean()) > 0.95


@pytest.mark.parametrize("seed", [0, 3])
def test_the_same_seed_gives_the_same_router_and_another_seed_another(seed):
    inputs, labels = examples()
    short = FitSettings(num_epochs=2, seed=seed)
    first, again = (train_sequence_router(inputs, labels, short) for _ in range(2))
    other = train_sequence_router(inputs, labels, FitSettings(num_epochs=2, seed=seed + 1))
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)


def test_training_draws_nothing_from_the_global_generator():
    inputs, labels = examples()
    before = torch.get_rng_state()
    train_sequence_router(inputs, labels, FitSettings(num_epochs=1))
    assert torch.equal(before, torch.get_rng_state())


def test_a_step_is_that_of_adamw_on_the_mean_cross_entropy():
    inputs, labels = examples()
    one_step = FitSettings(num_epochs=1, batch_size=N, held_out=0)
    found = train_sequence_router(inputs, labels, one_step)
    weight = torch.zeros(3 * L, D, requires_grad=True)
    scaled = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0, correction=0)
    loss = 0.0
    for row in range(N):
        logits = (weight @ scaled[row]).view(L, 3)
        for layer in range(L):
            loss = loss - logits[layer].log_softmax(0)[labels[row, layer]] / (N * L)
    loss.backward()
    clear = weight.grad.abs() > 1e-5
    assert float(clear.double().mean()) > 0.5
    # The first step of Adam goes by the gradient's sign.
    expected = -one_step.learning_rate * weight.grad.sign()
    torch.testing.assert_close(found.linear.weight[clear], expected[clear], atol=1e-5, rtol=0)


def test_the_rate_falls_to_zero_over_all_steps(monkeypatch):
    rates = []
    real = torch.optim.AdamW.step

    def noting(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    inputs, labels = examples()
    train_sequence_router(
        inputs, labels, FitSettings(num_epochs=2, learning_rate=0.5, held_out=0.25)
    )
    steps = 2 * math.ceil(0.75 * N / 16)
    assert rates == pytest.approx(
        [0.25 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    )


def test_the_weights_kept_are_those_that_do_best_on_examples_held_out():
    """With labels that nothing foretells, learning longer only does harm."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, D, generator=generator)
    labels = torch.randint(3, (60, L), generator=generator)
    options = {"num_epochs": 300, "learning_rate": 0.05}
    fresh_inputs = torch.randn(500, D, generator=generator)
    fresh_labels = torch.randint(3, (500, L), generator=generator)

    def loss(held_out):
        router = train_sequence_router(inputs, labels, FitSettings(**options, held_out=held_out))
        logits = router(fresh_inputs).flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, fresh_labels.flatten()))

    assert loss(0.2) < 0.5 * loss(0.0)
