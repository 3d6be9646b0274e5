"""The ridge regression of a refit against one solve on all tokens at once."""

import pytest
import torch

from drllm.tuning.ridge import RIDGES, TokenSums, solve_change

NUM_INPUTS, NUM_OUTPUTS = 12, 5


def make_tokens(num_tokens=400, num_texts=8, seed=0, size_of_first=50.0, size_of_noise=1.0):
    """Return inputs, residuals, targets and which tokens are first, for texts of equal length."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, NUM_INPUTS, dtype=torch.float64)
    truth = torch.randn(
        NUM_INPUTS, NUM_OUTPUTS, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    inputs = torch.randn(num_tokens, NUM_INPUTS, generator=generator, dtype=torch.float64) * scales
    noise = torch.randn(num_tokens, NUM_OUTPUTS, generator=generator, dtype=torch.float64)
    residuals = inputs @ truth + size_of_noise * noise
    targets = torch.randn(num_tokens, NUM_OUTPUTS, generator=generator, dtype=torch.float64)
    is_first = torch.zeros(num_tokens, dtype=torch.bool)
    is_first[:: num_tokens // num_texts] = True
    inputs[is_first] *= size_of_first
    targets[is_first] *= size_of_first
    return inputs, residuals, targets, is_first


def sum_up(tokens, num_parts=1):
    sums = TokenSums(NUM_INPUTS, NUM_OUTPUTS, torch.device("cpu"))
    for part in zip(*(torch.chunk(values, num_parts) for values in tokens), strict=True):
        sums.add(*part)
    return sums


def solve_at_once(tokens, ridge, weights):
    """Minimise the weighted squared error plus the ridge as one least-squares problem."""
    inputs, residuals, _, is_first = tokens
    scales = inputs[~is_first].square().mean(dim=0).sqrt()
    roots = weights.sqrt()[:, None]
    penalty = (ridge * len(inputs)) ** 0.5 * torch.diag(scales)
    rows = torch.cat([inputs * roots, penalty])
    values = torch.cat([residuals * roots, torch.zeros(NUM_INPUTS, NUM_OUTPUTS)])
    return torch.linalg.lstsq(rows, values).solution.T


def designed_weights(tokens):
    """1, and at a first token the mean of the others' target norms squared over its own."""
    _, _, targets, is_first = tokens
    squares = targets.square().sum(dim=1)
    weights = torch.ones(len(squares), dtype=torch.float64)
    weights[is_first] = squares[~is_first].mean() / squares[is_first]
    return weights


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 1.0])
def test_the_change_minimises_the_weighted_error_plus_the_ridge(ridge):
    fit, held_out = make_tokens(), make_tokens(seed=1)
    solution = solve_change(sum_up(fit), sum_up(held_out), ridges=[ridge])
    both = [torch.cat(pair) for pair in zip(fit, held_out, strict=True)]
    expected = solve_at_once(both, ridge, designed_weights(both))
    torch.testing.assert_close(solution.change, expected, rtol=1e-9, atol=1e-9)
    assert solution.ridge == ridge


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_first_tokens_may_have_a_weight_of_their_own(weight):
    tokens = make_tokens()
    both = [torch.cat(pair) for pair in zip(tokens, make_tokens(seed=1), strict=True)]
    weights = torch.ones(len(both[0]), dtype=torch.float64)
    weights[both[3]] = weight
    solution = solve_change(
        sum_up(tokens), sum_up(make_tokens(seed=1)), ridges=[0.01], first_token_weight=weight
    )
    torch.testing.assert_close(
        solution.change, solve_at_once(both, 0.01, weights), rtol=1e-9, atol=1e-9
    )


def test_sums_of_parts_are_the_sums_of_the_whole():
    whole = sum_up(make_tokens())
    parts = sum_up(make_tokens(), num_parts=7)
    for name in ("inner", "cross", "error", "target", "num_tokens"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    for sums, other in zip(
        whole.with_first_tokens(None), parts.with_first_tokens(None), strict=True
    ):
        torch.testing.assert_close(sums, other)


def test_the_error_of_a_change_is_that_of_the_tokens_without_first_ones():
    tokens = make_tokens()
    inputs, residuals, _, is_first = tokens
    change = torch.randn(NUM_INPUTS, NUM_OUTPUTS, dtype=torch.float64)
    error = (residuals - inputs @ change)[~is_first].square().sum(dim=1).mean()
    assert sum_up(tokens).error_of(change) == pytest.approx(float(error))


def test_the_ridge_is_the_one_with_the_least_error_on_held_out_texts():
    fit = make_tokens(24, 2, size_of_noise=5.0)
    held_out = make_tokens(4000, 2, seed=1, size_of_noise=5.0)
    sums = sum_up(fit)
    errors = {}
    for ridge in RIDGES:
        change = solve_at_once(fit, ridge, designed_weights(fit)).T
        errors[ridge] = sum_up(held_out).error_of(change)
    best = min(errors, key=errors.get)
    assert best not in (RIDGES[0], RIDGES[-1])
    solution = solve_change(sums, sum_up(held_out))
    assert solution.ridge == best
    without = sum_up(held_out).error_of(torch.zeros(NUM_INPUTS, NUM_OUTPUTS, dtype=torch.float64))
    assert solution.unexplained == pytest.approx(errors[best] / without)


def test_an_input_that_is_always_zero_gets_no_change():
    fit, held_out = list(make_tokens()), list(make_tokens(seed=1))
    for tokens in (fit, held_out):
        tokens[0] = tokens[0].clone()
        tokens[0][:, 3] = 0
    change = solve_change(sum_up(fit), sum_up(held_out)).change
    assert torch.isfinite(change).all()
    assert (change[:, 3] == 0).all()


def test_inputs_that_fire_at_first_tokens_alone_explain_them():
    changed = []
    for seed in (0, 1):
        inputs, residuals, targets, is_first = make_tokens(seed=seed)
        inputs = inputs.clone()
        inputs[:, :4] = 0
        # All texts begin with the same token, and only these inputs have a value there.
        inputs[is_first] = torch.tensor(
            [500.0, 300.0, 200.0, 400.0] + [0.0] * (NUM_INPUTS - 4)
        ).double()
        residuals = residuals.clone()
        residuals[is_first] = 7.0
        changed.append((inputs, residuals, targets, is_first))
    fit, held_out = changed
    solution = solve_change(sum_up(fit), sum_up(held_out))
    inputs, residuals, _, is_first = fit
    explained = inputs[is_first] @ solution.change.T
    torch.testing.assert_close(explained, residuals[is_first], rtol=0.05, atol=0)
    assert solution.unexplained < 1


@pytest.mark.parametrize("weight", [None, 1.0])
def test_a_first_token_without_a_target_has_a_finite_weight(weight):
    tokens = make_tokens()
    tokens[2][tokens[3]] = 0
    inner, cross, _ = sum_up(tokens).with_first_tokens(weight)
    assert torch.isfinite(inner).all()
    assert torch.isfinite(cross).all()


def test_a_gap_that_lacks_nothing_gets_no_change():
    inputs, residuals, targets, is_first = make_tokens()
    tokens = inputs, torch.zeros_like(residuals), targets, is_first
    solution = solve_change(sum_up(tokens), sum_up(tokens))
    assert not solution.change.any()
    assert solution.unexplained == 0


def test_inputs_that_are_0_in_all_tokens_get_no_change():
    inputs, residuals, targets, is_first = make_tokens()
    tokens = torch.zeros_like(inputs), residuals, targets, is_first
    solution = solve_change(sum_up(tokens), sum_up(tokens))
    assert not solution.change.any()
    assert solution.unexplained == 1
