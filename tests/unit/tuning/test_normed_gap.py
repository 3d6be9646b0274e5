"""A gap where a norm follows the MLP, solved by steps of the Gauss-Newton method."""

import weakref

import pytest
import torch

from drllm.tuning.normed_gap import NormedMap, NormedTokens, solve_normed_change

NUM_INPUTS, NUM_OUTPUTS = 24, 8
EPSILON = 1e-6


def make_map(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=generator, dtype=torch.float64)
    gain = 0.5 + torch.rand(NUM_OUTPUTS, generator=generator, dtype=torch.float64)
    return NormedMap(weight, gain, EPSILON)


def make_tokens(truth, num_tokens=1200, num_texts=30, seed=0, noise=0.0):
    """Return tokens whose targets are what a true map gives, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_tokens, NUM_INPUTS, generator=generator)
    states = torch.randn(num_tokens, NUM_OUTPUTS, generator=generator)
    normed, _ = truth.run(inputs.double())
    targets = states + (truth.gain * normed).float()
    targets += noise * torch.randn(num_tokens, NUM_OUTPUTS, generator=generator)
    is_first = torch.zeros(num_tokens, dtype=torch.bool)
    is_first[:: num_tokens // num_texts] = True
    return NormedTokens(inputs, states, targets, is_first)


def solve(start, fit, held_out, num_parts=1):
    parts = [
        NormedTokens(*part)
        for part in zip(*(torch.chunk(values, num_parts) for values in fit), strict=True)
    ]
    return solve_normed_change(start, lambda: parts, held_out)


def test_the_output_is_that_of_a_linear_map_and_a_norm():
    present = make_map()
    inputs = torch.randn(10, NUM_INPUTS, dtype=torch.float64)
    norm = torch.nn.RMSNorm(NUM_OUTPUTS, eps=EPSILON, dtype=torch.float64)
    norm.weight.data = present.gain
    normed, _ = present.run(inputs)
    torch.testing.assert_close(present.gain * normed, norm(inputs @ present.weight.T))


def test_a_change_that_a_true_map_made_is_found():
    truth = make_map()
    generator = torch.Generator().manual_seed(5)
    shift = torch.randn(truth.weight.shape, generator=generator, dtype=torch.float64)
    start = NormedMap(truth.weight + 0.4 * shift, 1.3 * truth.gain, EPSILON)
    solution = solve(start, make_tokens(truth), make_tokens(truth, 300, 6, seed=1))
    assert solution.unexplained < 0.02


def test_a_gain_that_alone_is_wrong_is_found():
    truth = make_map()
    start = NormedMap(truth.weight, 1.5 * truth.gain, EPSILON)
    solution = solve(start, make_tokens(truth), make_tokens(truth, 300, 6, seed=1))
    torch.testing.assert_close(solution.map.gain, truth.gain, rtol=0.05, atol=0)
    assert solution.unexplained < 0.01


def test_parts_give_what_the_whole_gives():
    truth = make_map()
    start = make_map(seed=1)
    held_out = make_tokens(truth, 300, 6, seed=1, noise=0.3)
    whole = solve(start, make_tokens(truth, noise=0.3), held_out)
    parts = solve(start, make_tokens(truth, noise=0.3), held_out, num_parts=7)
    torch.testing.assert_close(parts.map.weight, whole.map.weight)
    torch.testing.assert_close(parts.map.gain, whole.map.gain)


def test_the_error_on_held_out_tokens_never_rises():
    start = make_map()
    nothing_to_learn = make_tokens(start, 60, 4, noise=3.0)
    solution = solve(start, nothing_to_learn, make_tokens(start, 300, 6, seed=1, noise=0.1))
    assert solution.unexplained <= 1


def test_a_channel_without_gain_stays_finite():
    truth = make_map()
    gain = truth.gain.clone()
    gain[2] = 0
    solution = solve(
        NormedMap(truth.weight, gain, EPSILON),
        make_tokens(truth),
        make_tokens(truth, 300, 6, seed=1),
    )
    assert torch.isfinite(solution.map.weight).all()
    assert torch.isfinite(solution.map.gain).all()


def test_a_channel_that_is_always_0_keeps_its_gain_and_spoils_no_other():
    truth = make_map()
    weight = truth.weight.clone()
    weight[3] = 0
    dead = NormedMap(weight, truth.gain, EPSILON)
    start = NormedMap(weight, 1.5 * truth.gain, EPSILON)
    solution = solve(start, make_tokens(dead), make_tokens(dead, 300, 6, seed=1))
    assert solution.unexplained < 0.01
    assert torch.isfinite(solution.map.gain).all()


@pytest.mark.parametrize("weight", [0.0, None])
def test_first_tokens_have_the_weight_that_is_given(weight):
    truth = make_map()
    start = make_map(seed=1)
    held_out = make_tokens(truth, 300, 6, seed=1)
    fit = make_tokens(truth)
    others = fit._replace(inputs=torch.where(fit.is_first[:, None], 5 * fit.inputs, fit.inputs))
    weights = []
    for tokens in (fit, others):
        solution = solve_normed_change(
            start, lambda tokens=tokens: [tokens], held_out, first_token_weight=weight
        )
        weights.append(solution.map.weight)
    assert torch.equal(*weights) == (weight == 0)


def test_a_gap_that_lacks_nothing_is_left_as_it_is():
    start = make_map()
    held_out = NormedTokens(torch.randn(6, NUM_INPUTS), torch.zeros(6, NUM_OUTPUTS), *([None] * 2))
    normed, _ = start.run(held_out.inputs.double())
    is_first = torch.tensor([True] + [False] * 5)
    tokens = held_out._replace(targets=start.gain * normed, is_first=is_first)
    solution = solve(start, tokens, tokens)
    assert solution.map == start
    assert solution.unexplained == 0


def test_of_the_steps_that_were_tried_only_the_best_and_the_last_are_in_memory(monkeypatch):
    tried = weakref.WeakValueDictionary()
    nums_in_memory = []
    measure = NormedMap.error

    def measure_and_count(self, tokens):
        tried[id(self.weight)] = self.weight
        nums_in_memory.append(len(tried))
        return measure(self, tokens)

    monkeypatch.setattr(NormedMap, "error", measure_and_count)
    truth = make_map()
    start = NormedMap(truth.weight + 0.3, truth.gain, EPSILON)
    solve(start, make_tokens(truth), make_tokens(truth, 300, 6, seed=1))
    assert len(nums_in_memory) > 20
    # The first weight, the present one, the best step, the last step, and the one that is tried.
    assert max(nums_in_memory) <= 5
