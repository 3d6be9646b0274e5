"""Sums over tokens and the ridge regression against one solve on all tokens at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drllm.prune.least_squares import Ridge, Sums, share_of_error

NUM_INPUTS, NUM_OUTPUTS = 7, 3
SUMS = ("inner", "cross", "inputs", "outputs", "squares", "count")


def make_tokens(num_tokens=60, num_inputs=NUM_INPUTS, seed=0):
    """Return inputs of very different scales, outputs, and weights."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    scales = torch.logspace(-2, 2, num_inputs, dtype=torch.float64)
    inputs = scales * (1 + torch.randn(num_tokens, num_inputs, **options))
    outputs = 3 + torch.randn(num_tokens, NUM_OUTPUTS, **options)
    return inputs, outputs, torch.rand(num_tokens, **options)


def sum_up(inputs, outputs, weights=None):
    sums = Sums(inputs.shape[1], outputs.shape[1], "cpu")
    sums.add(inputs, outputs, weights)
    return sums


def assert_same_sums(sums, other):
    for name in SUMS:
        torch.testing.assert_close(getattr(sums, name), getattr(other, name))


def solve(sums, scales, ridge):
    solver = Ridge(sums.inner.clone(), scales, sums.count)
    return solver.solve(sums.cross, solver.factor(ridge))


def solve_at_once(inputs, outputs, scales, ridge):
    """Minimise the squared error plus the ridge as one least-squares problem of numpy."""
    penalty = np.sqrt(ridge * len(inputs)) * np.diag(scales)
    rows = np.concatenate([inputs, penalty])
    values = np.concatenate([outputs, np.zeros((len(scales), outputs.shape[1]))])
    return torch.tensor(np.linalg.lstsq(rows, values, rcond=None)[0])


@settings(deadline=None)
@given(
    num_tokens=st.integers(2, 40),
    num_inputs=st.integers(1, 9),
    exponent=st.floats(-4, 1),
    seed=st.integers(0, 9),
)
def test_the_map_minimises_the_squared_error_plus_the_ridge(num_tokens, num_inputs, exponent, seed):
    inputs, outputs, _ = make_tokens(num_tokens, num_inputs, seed)
    scales = inputs.square().mean(dim=0).sqrt()
    found = solve(sum_up(inputs, outputs), scales, 10**exponent)
    expected = solve_at_once(inputs, outputs, scales, 10**exponent)
    torch.testing.assert_close(scales[:, None] * found, scales[:, None] * expected)


def test_weights_count_tokens_that_often():
    inputs, outputs, _ = make_tokens()
    times = torch.arange(len(inputs)) % 3
    weighted = sum_up(inputs, outputs, times.double())
    repeated = sum_up(inputs.repeat_interleave(times, 0), outputs.repeat_interleave(times, 0))
    weighted.count = repeated.count
    assert_same_sums(weighted, repeated)


@settings(deadline=None)
@given(cut=st.integers(0, 60), is_merged=st.booleans(), has_weights=st.booleans())
def test_sums_of_two_parts_are_the_sums_of_the_whole(cut, is_merged, has_weights):
    tokens = make_tokens()[: 2 + has_weights]
    first = sum_up(*(values[:cut] for values in tokens))
    rest = [values[cut:] for values in tokens]
    if is_merged:
        first.merge(sum_up(*rest))
    else:
        first.add(*rest)
    assert_same_sums(first, sum_up(*tokens))


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_error_of_a_map_is_the_mean_over_all_tokens(has_bias):
    inputs, outputs, _ = make_tokens()
    weight = torch.randn(NUM_INPUTS, NUM_OUTPUTS, dtype=torch.float64)
    bias = torch.randn(NUM_OUTPUTS, dtype=torch.float64) if has_bias else None
    residuals = outputs - inputs @ weight - (bias if has_bias else 0)
    expected = float(residuals.square().sum(dim=1).mean())
    assert sum_up(inputs, outputs).error(weight, bias) == pytest.approx(expected)


def test_an_input_that_is_always_zero_gets_no_weight_and_spoils_no_other():
    inputs, outputs, _ = make_tokens()
    others = [0, 1, 2, 4, 5, 6]
    inputs[:, 3] = 0
    scales = inputs.square().mean(dim=0).sqrt()
    found = solve(sum_up(inputs, outputs), scales, 1e-3)
    assert not found[3].any()
    expected = solve_at_once(inputs[:, others], outputs, scales[others], 1e-3)
    torch.testing.assert_close(found[others], expected)


def test_inputs_that_are_all_zero_get_no_weight():
    _, outputs, _ = make_tokens()
    zeros = torch.zeros(len(outputs), NUM_INPUTS)
    assert not solve(sum_up(zeros, outputs), torch.zeros(NUM_INPUTS).double(), 1e-3).any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_sums_of_values_that_are_not_finite_say_so(value):
    inputs, outputs, _ = make_tokens()
    assert sum_up(inputs, outputs).is_finite
    outputs[5, 1] = value
    assert not sum_up(inputs, outputs).is_finite


def test_of_nothing_to_explain_nothing_is_left():
    assert share_of_error(0.0, 0.0) == 0
    assert share_of_error(1.0, 4.0) == 0.25
