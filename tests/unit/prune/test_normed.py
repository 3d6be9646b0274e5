"""A gap where a norm follows the MLP, solved by steps of the Gauss-Newton method."""

from dataclasses import replace

import pytest
import torch

from drllm.prune.repairs.normed import NormedMap, NormedTokens, solve_normed

NUM_INPUTS, NUM_OUTPUTS = 24, 8


def make_map(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=generator, dtype=torch.float64)
    gain = 0.5 + torch.rand(NUM_OUTPUTS, generator=generator, dtype=torch.float64)
    return NormedMap(weight, gain, epsilon=1e-6)


def make_tokens(truth, num_tokens=1200, seed=0, noise=0.0):
    """Return tokens whose targets are what a true map gives, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_tokens, NUM_INPUTS, generator=generator)
    states = torch.randn(num_tokens, NUM_OUTPUTS, generator=generator)
    normed, _ = truth.run(inputs)
    targets = states + (truth.gain * normed).float()
    targets += noise * torch.randn(num_tokens, NUM_OUTPUTS, generator=generator)
    return NormedTokens(inputs, states, targets, torch.arange(num_tokens) % 40 == 0)


def solve(start, fit, held_out, num_parts=1):
    """Return the solved map, and its error as a share of that at the start."""
    chunks = zip(*(torch.chunk(values, num_parts) for values in fit), strict=True)
    parts = [NormedTokens(*part) for part in chunks]
    solved, _ = solve_normed(start, lambda: parts, held_out)
    return solved, solved.error(held_out) / start.error(held_out)


def test_the_output_is_that_of_a_linear_map_and_a_norm():
    present = make_map()
    inputs = torch.randn(10, NUM_INPUTS, dtype=torch.float64)
    norm = torch.nn.RMSNorm(NUM_OUTPUTS, eps=1e-6, dtype=torch.float64)
    norm.weight.data = present.gain
    normed, sizes = present.run(inputs)
    torch.testing.assert_close(present.gain * normed, norm(inputs @ present.weight.T))
    torch.testing.assert_close(normed * sizes, inputs @ present.weight.T)


def test_the_error_is_that_of_tokens_that_are_not_first():
    truth = make_map()
    tokens = make_tokens(truth)
    tokens.targets[~tokens.is_first] += 1.0  # the error is 1 in each channel
    tokens.targets[tokens.is_first] += 100.0
    assert truth.error(tokens) == pytest.approx(NUM_OUTPUTS, rel=1e-4)


def make_start(truth):
    """Return a map whose weight and gain are far from the true ones."""
    weight = truth.weight + 0.4 * make_map(seed=5).weight
    return replace(truth, weight=weight, gain=1.3 * truth.gain)


def test_a_change_that_a_true_map_made_is_found_in_some_steps():
    truth = make_map()
    held_out = make_tokens(truth, 300, seed=1)
    _, unexplained = solve(make_start(truth), make_tokens(truth), held_out)
    assert unexplained < 1e-3  # the first step leaves 0.01


def test_a_gain_that_alone_is_wrong_is_found():
    truth = make_map()
    start = replace(truth, gain=1.5 * truth.gain)
    solved, unexplained = solve(start, make_tokens(truth), make_tokens(truth, 300, seed=1))
    torch.testing.assert_close(solved.gain, truth.gain, rtol=0.05, atol=0)
    assert unexplained < 0.01


def test_parts_give_what_the_whole_gives():
    fit = make_tokens(make_map(), noise=0.3)
    held_out = make_tokens(make_map(), 300, seed=1, noise=0.3)
    whole, _ = solve(make_map(seed=1), fit, held_out)
    parts, _ = solve(make_map(seed=1), fit, held_out, num_parts=7)
    torch.testing.assert_close(parts.weight, whole.weight)
    torch.testing.assert_close(parts.gain, whole.gain)


def test_a_channel_without_gain_gets_one_and_spoils_no_other():
    truth = make_map()
    start = make_start(truth)
    start.gain[2] = 0
    solved, unexplained = solve(start, make_tokens(truth), make_tokens(truth, 300, seed=1))
    assert unexplained < 0.2
    assert solved.gain.isfinite().all()


def test_a_channel_that_is_always_0_keeps_its_gain_and_spoils_no_other():
    weight = make_map().weight.clone()
    weight[3] = 0
    dead = replace(make_map(), weight=weight)
    start = replace(dead, gain=1.5 * dead.gain)
    solved, unexplained = solve(start, make_tokens(dead), make_tokens(dead, 300, seed=1))
    assert unexplained < 0.01
    assert solved.gain.isfinite().all()


def test_first_tokens_take_part():
    truth = make_map()
    held_out = make_tokens(truth, 300, seed=1)
    fit = make_tokens(truth)
    others = fit._replace(states=torch.where(fit.is_first[:, None], 5 * fit.states, fit.states))
    weights = [solve(make_map(seed=1), tokens, held_out)[0].weight for tokens in (fit, others)]
    assert not torch.allclose(*weights)


def test_a_gap_that_lacks_nothing_is_left_as_it_is():
    start = make_map()
    inputs = torch.randn(6, NUM_INPUTS, dtype=torch.float64)
    targets = start.gain * start.run(inputs)[0]
    is_first = torch.tensor([True] + [False] * 5)
    tokens = NormedTokens(inputs, torch.zeros_like(targets), targets, is_first)
    solved, ridge = solve_normed(start, lambda: [tokens], tokens)
    assert solved is start
    assert ridge == 0
