"""Sums in which the first token of a text has a weight of its own."""

import pytest
import torch

from drllm.prune.repairs.weighted import LARGEST_WEIGHT, WeightedSums

NUM_INPUTS, NUM_OUTPUTS, NUM_TEXTS = 12, 5, 8


def make_tokens(seed=0, size_of_first=50.0):
    """Return inputs, residuals, targets and which tokens are first; first ones are large."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (NUM_INPUTS, NUM_OUTPUTS, NUM_OUTPUTS)
    parts = [torch.randn(400, size, generator=generator, dtype=torch.float64) for size in sizes]
    is_first = torch.zeros(400, dtype=torch.bool)
    is_first[:: 400 // NUM_TEXTS] = True
    parts[0][is_first] *= size_of_first
    parts[2][is_first] *= size_of_first
    return (*parts, is_first)


def sum_up(tokens, num_parts=1):
    sums = WeightedSums(NUM_INPUTS, NUM_OUTPUTS, "cpu")
    for part in zip(*(torch.chunk(values, num_parts) for values in tokens), strict=True):
        sums.add(*part)
    return sums


def solve(sums, ridge):
    inner, cross, _ = sums.with_first_tokens()
    solver = sums.make_solver(inner)
    return solver.solve(cross, solver.factor(ridge))


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 1.0])
def test_the_map_minimises_the_weighted_error_plus_the_ridge(ridge):
    tokens = make_tokens()
    inputs, residuals, targets, is_first = tokens
    squares = targets.square().sum(dim=1)
    weights = torch.ones(len(squares), dtype=torch.float64)
    weights[is_first] = squares[~is_first].mean() / squares[is_first]
    roots = weights.sqrt()[:, None]
    penalty = (ridge * len(inputs)) ** 0.5 * inputs[~is_first].square().mean(dim=0).sqrt().diag()
    rows = torch.cat([inputs * roots, penalty])
    values = torch.cat([residuals * roots, torch.zeros(NUM_INPUTS, NUM_OUTPUTS)])
    expected = torch.linalg.lstsq(rows, values).solution
    torch.testing.assert_close(solve(sum_up(tokens), ridge), expected)


@pytest.mark.parametrize("is_merged", [False, True])
def test_sums_of_parts_are_the_sums_of_the_whole(is_merged):
    tokens, others = make_tokens(), make_tokens(seed=1)
    whole = [torch.cat(pair) for pair in zip(tokens, others, strict=True)]
    if is_merged:
        parts = sum_up(tokens)
        parts.merge(sum_up(others))
    else:
        parts = sum_up(whole, num_parts=7)
    for found, expected in zip(
        parts.with_first_tokens(), sum_up(whole).with_first_tokens(), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_the_error_of_a_map_is_that_of_the_tokens_without_first_ones():
    inputs, residuals, _, is_first = tokens = make_tokens()
    weight = torch.randn(NUM_INPUTS, NUM_OUTPUTS, dtype=torch.float64)
    expected = (residuals - inputs @ weight)[~is_first].square().sum(dim=1).mean()
    assert sum_up(tokens).error(weight) == pytest.approx(float(expected))


def test_a_first_token_without_a_target_has_the_largest_weight():
    _, _, targets, is_first = tokens = make_tokens()
    targets[0] = 0
    weights = sum_up(tokens).weigh(targets, is_first)
    assert float(weights[0]) == pytest.approx(LARGEST_WEIGHT)
    assert (weights[is_first][1:] < 1).all()
    assert (weights[~is_first] == 1).all()


def test_inputs_that_fire_at_first_tokens_alone_explain_them():
    inputs, residuals, _, is_first = tokens = make_tokens()
    inputs[:, :4] = 0
    # All texts begin with the same token, and only these inputs have a value there.
    values = [500.0, 300.0, 200.0, 400.0] + [0.0] * (NUM_INPUTS - 4)
    inputs[is_first] = torch.tensor(values, dtype=torch.float64)
    residuals[is_first] = 7.0
    explained = inputs[is_first] @ solve(sum_up(tokens), 1e-6)
    torch.testing.assert_close(explained, residuals[is_first], rtol=0.05, atol=0)
