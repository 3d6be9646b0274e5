import itertools
import math

import pytest
import torch

from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack, Spans, Windows
from slow_way import router_logits, window_means

L, D, W, H = 3, 5, 4, 7
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order
CONFIG = RouterConfig(num_layers=L, hidden_size=D, num_windows=W, router_width=H)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def new_stack(seed=0):
    """Routers whose biases aren't zero, so that leaving one out is noticed."""
    stack = RouterStack(CONFIG, generator(seed))
    for bias in (stack.hidden_bias, stack.decision_bias):
        bias.data.normal_(generator=generator(seed + 1))
    return stack


def pool(hidden, readable, num_windows):
    return Spans(readable, num_windows).means(hidden)


def assert_pooled_like_the_slow_loop(hidden, readable, windows):
    pooled = pool(hidden, readable, windows)
    assert pooled.means.shape == (len(hidden), windows, hidden.shape[2])
    assert pooled.means.dtype == torch.float32
    for row in range(len(hidden)):
        tokens = [hidden[row, t] for t in range(hidden.shape[1]) if readable[row, t]]
        expected = window_means(tokens, windows)
        assert int(pooled.filled[row]) == len(expected)
        for window, mean in enumerate(expected):
            torch.testing.assert_close(pooled.means[row, window], mean, **CLOSE)
        assert not pooled.means[row, len(expected) :].any()


@pytest.mark.parametrize("windows", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_windows_equal_the_slow_loop_at_every_length_and_precision(length, windows, dtype):
    hidden = torch.randn(2, length, 3, generator=generator(length)).to(dtype)
    assert_pooled_like_the_slow_loop(hidden, torch.ones(2, length, dtype=torch.bool), windows)


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("junk", [0.0, 1e30, math.nan, math.inf])
def test_padding_never_counts_whatever_it_holds(side, junk):
    T = 20
    place = torch.arange(T)
    readable = {
        "left": torch.stack([place >= 20 - n for n in (20, 13, 5, 1)]),
        "right": torch.stack([place < n for n in (20, 13, 5, 1)]),
        "both": torch.stack([(place >= 3) & (place < 3 + n) for n in (17, 11, 4, 1)]),
        "holes": torch.stack([place % n == 0 for n in (1, 2, 5, 19)]),
    }[side]
    hidden = torch.randn(4, T, 3, generator=generator())
    hidden[~readable] = junk
    assert_pooled_like_the_slow_loop(hidden, readable, windows=8)


@pytest.mark.parametrize("length", [4097, 12289, 131072])
def test_the_window_edges_of_long_prompts_are_exact(length):
    edges = [window * length // 8 for window in range(9)]
    hidden = torch.zeros(1, length, 2)
    hidden[0, edges[:-1], 0] = 1.0  # marks the first token of each window
    hidden[0, [edge - 1 for edge in edges[1:]], 1] = 1.0  # and the last
    means = pool(hidden, torch.ones(1, length, dtype=torch.bool), 8).means
    expected = [[1 / (end - start)] * 2 for start, end in itertools.pairwise(edges)]
    torch.testing.assert_close(means[0], torch.tensor(expected), rtol=1e-6, atol=0.0)


def batch_of_windows():
    means = torch.randn(6, L, W, D, generator=generator(3))
    filled = torch.tensor([4, 1, 2, 3, 4, 1])
    for row, number in enumerate(filled.tolist()):
        means[row, :, number:] = 0
    return means, filled


def test_logits_are_the_mean_over_the_filled_windows_of_each_routers_own_alone_and_together():
    stack = new_stack()
    means, filled = batch_of_windows()
    logits = stack(means, filled)
    assert logits.shape == (6, L, 3)
    for row, layer in itertools.product(range(6), range(L)):
        expected = router_logits(stack, layer, list(means[row, layer, : filled[row]]))
        alone = stack.layer_logits(layer, Windows(means=means[:, layer], filled=filled))
        torch.testing.assert_close(logits[row, layer].detach(), expected, **CLOSE)
        torch.testing.assert_close(alone[row].detach(), expected, **CLOSE)


@pytest.mark.parametrize("junk", [7.0, math.nan, math.inf])
def test_what_unfilled_windows_hold_never_counts(junk):
    stack = new_stack()
    means, filled = batch_of_windows()
    dirty = means.clone()
    for row, number in enumerate(filled.tolist()):
        dirty[row, :, number:] = junk
    torch.testing.assert_close(stack(dirty, filled), stack(means, filled), **CLOSE)


@pytest.mark.parametrize(
    ("layers", "hidden", "parameters"),
    [(28, 3072, 11_024_468), (32, 4096, 16_793_696), (30, 576, 2_227_290)],
    ids=["Llama-3.2-3B", "Llama-3.1-8B", "SmolLM2-135M"],
)
def test_parameter_counts_are_those_of_the_paper(layers, hidden, parameters):
    stack = RouterStack(RouterConfig(num_layers=layers, hidden_size=hidden))
    assert parameters == sum(weight.numel() for weight in stack.parameters())


def test_initial_weights_are_xavier_uniform_per_layer_by_the_generator_and_biases_zero():
    stack = RouterStack(RouterConfig(num_layers=2, hidden_size=300), generator())
    for weight, fan_in, fan_out in (
        (stack.hidden_weight, 300, 128),
        (stack.decision_weight, 128, 3),
    ):
        limit = math.sqrt(6 / (fan_in + fan_out))
        for layer in weight.detach():
            assert 0.97 * limit < float(layer.abs().max()) <= limit
            assert float(layer.std()) == pytest.approx(limit / math.sqrt(3), rel=0.1)
    assert not stack.hidden_bias.any()
    assert not stack.decision_bias.any()
    one, same, other = (RouterStack(CONFIG, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.hidden_weight, same.hidden_weight)
    assert not torch.equal(one.hidden_weight, other.hidden_weight)
