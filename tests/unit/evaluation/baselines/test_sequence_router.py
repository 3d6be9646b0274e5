"""The router for the whole model: what it reads, how it is followed, how it is trained."""

import math

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from drllm.evaluation.baselines.fitting.sequence_router import (
    SequenceRouter,
    SequenceRouterPolicy,
    find_bias,
    first_inputs,
    train_sequence_router,
)
from drllm.models.routers.depth_control import routes_of
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Question


@pytest.fixture(scope="module")
def prompts(some_prompts):
    return some_prompts(40)


@pytest.fixture(scope="module")
def router(routed, prompts):
    router = SequenceRouter(first_inputs(routed, prompts), routed.num_layers)
    router.linear.weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return router


def test_what_is_read_is_the_mean_embedding_of_each_prompt_alone(model, routed, prompts):
    found = first_inputs(routed, prompts)
    for prompt, row in zip(prompts, found, strict=True):
        expected = model.model.embed_tokens(torch.tensor(prompt)).mean(dim=0)
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_the_policy_follows_the_plans_of_each_prompt(routed, router, prompts, bias):
    expected = router.plans(first_inputs(routed, prompts), bias)
    routes = routes_of(routed, SequenceRouterPolicy(router, bias), prompts, batch_size=7)
    assert torch.equal(routes, expected)
    assert len(set(map(tuple, routes.tolist()))) > 10


def test_a_scored_continuation_is_not_read(routed, router, prompts):
    questions = [Question(prompt, [[10, 11, 12], [13], [14, 15]]) for prompt in prompts[:6]]
    policy = SequenceRouterPolicy(router)
    _, routes = ChoiceBatch(routed, questions, 1.0).routed_scores(policy)
    assert torch.equal(routes, routes_of(routed, policy, prompts[:6]))


@pytest.mark.parametrize("executions", [1.2, 2.0, 3.3, 4.0, 6.5])
def test_the_bias_gives_the_wanted_executions_when_the_policy_runs(
    routed, router, prompts, executions
):
    found = find_bias(router, first_inputs(routed, prompts), executions)
    assert found.executions == pytest.approx(executions, abs=1 / len(prompts))
    routes = routes_of(routed, SequenceRouterPolicy(router, found.value), prompts)
    assert float(routes.sum(dim=1).double().mean()) == found.executions


def test_a_row_that_would_skip_everything_runs_the_last_layer(router):
    assert router.plans(torch.zeros(2, 32), 1000.0).tolist() == [[0, 0, 0, 1]] * 2


def test_scaled_inputs_have_mean_0_and_deviation_1_but_where_nothing_varies():
    inputs = 3 + 0.01 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    inputs[:, 2] = 7.0
    scaled = SequenceRouter(inputs, 4).scaled(inputs)
    assert scaled[:, 2].tolist() == [0.0] * 200
    others = scaled[:, [0, 1, 3, 4]]
    torch.testing.assert_close(others.mean(dim=0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(others.std(dim=0, correction=0), torch.ones(4))


N, D, L = 200, 24, 10


@pytest.fixture(scope="module")
def examples():
    """Prompts of three kinds, each with decisions of its own."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(3, (N,), generator=generator)
    plans = torch.multinomial(
        torch.tensor([0.3, 0.6, 0.1]), 3 * L, replacement=True, generator=generator
    ).view(3, L)
    inputs = 0.02 * torch.randn(N, D, generator=generator)
    inputs[:, :3] += 0.1 * torch.eye(3)[kinds]
    return inputs, plans[kinds]


def test_decisions_that_follow_from_the_prompt_are_learned(examples):
    inputs, labels = examples
    router = train_sequence_router(inputs[:150], labels[:150])
    found = router.plans(inputs[150:], 0.0)
    assert float((found == labels[150:]).double().mean()) > 0.95


def test_the_same_seed_trains_the_same_router_and_another_seed_another(examples):
    before = torch.get_rng_state()
    first, again, other = (
        parameters_to_vector(train_sequence_router(*examples, seed=seed, num_epochs=2).parameters())
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state()), "the global generator stays as it was"


def test_a_step_is_that_of_adamw_on_the_mean_cross_entropy(examples):
    inputs, labels = examples
    found = train_sequence_router(inputs, labels, num_epochs=1, batch_size=N, held_out=0)
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
    # The first step of Adam goes by the gradient's sign, as far as the learning rate.
    expected = -3e-3 * weight.grad.sign()
    torch.testing.assert_close(found.linear.weight[clear], expected[clear], atol=1e-5, rtol=0)


def test_the_rate_falls_to_zero_over_all_steps(examples, monkeypatch):
    rates = []
    real = torch.optim.AdamW.step

    def noting(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    train_sequence_router(*examples, num_epochs=2, learning_rate=0.5, held_out=0.25)
    steps = 2 * math.ceil(0.75 * N / 16)
    assert rates == pytest.approx(
        [0.25 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    )


def test_the_weights_kept_are_those_that_do_best_on_examples_held_out():
    """With labels that nothing foretells, learning longer only does harm."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, D, generator=generator)
    labels = torch.randint(3, (60, L), generator=generator)
    fresh_inputs = torch.randn(500, D, generator=generator)
    fresh_labels = torch.randint(3, (500, L), generator=generator)

    def loss(held_out):
        router = train_sequence_router(
            inputs, labels, num_epochs=300, learning_rate=0.05, held_out=held_out
        )
        logits = router(fresh_inputs).flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, fresh_labels.flatten()))

    assert loss(0.2) < 0.5 * loss(0.0)
