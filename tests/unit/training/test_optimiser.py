import pytest
import torch

from drllm.training import optimiser
from drllm.training.optimiser import AdamW

EXACT = 1e-12  # float64: a root is corrected before instead of after the division

SHAPES = {"hidden_weight": (3, 5, 4), "hidden_bias": (3, 4)}
RATES = [1e-2, 3e-3, 0.5]
DECAYS = [0.01, 0.0, 0.3]


def draw(runs: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(runs, *shape, dtype=torch.float64, generator=generator)
        for name, shape in SHAPES.items()
    }


def theirs(weights: dict[str, torch.Tensor], run: int) -> torch.optim.AdamW:
    """torch's optimiser for one run, whose biases don't decay."""
    groups = [
        {
            "params": [torch.nn.Parameter(weight[run].clone())],
            "weight_decay": 0.0 if name.endswith("bias") else DECAYS[run],
        }
        for name, weight in weights.items()
    ]
    return torch.optim.AdamW(groups, lr=RATES[run])


@pytest.mark.parametrize("at_once", [7, 2**16], ids=["in pieces", "whole"])
def test_each_run_is_updated_as_by_torch(monkeypatch, at_once):
    monkeypatch.setattr(optimiser, "AT_ONCE_ON_CPU", at_once)
    generator = torch.Generator().manual_seed(0)
    weights = draw(3, generator)
    slow = [theirs(weights, run) for run in range(3)]
    ours = AdamW(weights, DECAYS)
    for step in range(1, 31):
        gradients = draw(3, generator)
        rates = [rate / step for rate in RATES]
        for run, twin in enumerate(slow):
            for group, gradient in zip(twin.param_groups, gradients.values(), strict=True):
                group["lr"] = rates[run]
                group["params"][0].grad = gradient[run].clone()
            twin.step()
        ours.step(gradients, rates, [step] * 3)
    for run, twin in enumerate(slow):
        for name, group in zip(SHAPES, twin.param_groups, strict=True):
            expected = group["params"][0].data
            torch.testing.assert_close(ours.weights[name][run], expected, rtol=0, atol=EXACT)


def test_a_run_has_the_same_bits_in_any_company():
    generator = torch.Generator().manual_seed(1)
    together, gradients = draw(3, generator), draw(3, generator)
    alone = {name: weight[1:2].clone() for name, weight in together.items()}
    AdamW(together, DECAYS).step(gradients, RATES, [4, 2, 9])
    AdamW(alone, DECAYS[1:2]).step({n: g[1:2] for n, g in gradients.items()}, RATES[1:2], [2])
    assert all(torch.equal(alone[name][0], together[name][1]) for name in SHAPES)


def test_runs_without_a_gradient_stay_as_they_are():
    generator = torch.Generator().manual_seed(2)
    weights = draw(3, generator)
    before = {name: weight.clone() for name, weight in weights.items()}
    ours = AdamW(weights, DECAYS)
    ours.step(draw(2, generator), RATES[:2], [1, 1])
    for name in SHAPES:
        assert torch.equal(before[name][2], ours.weights[name][2])
        assert not ours.means[name][2].any()
        assert not torch.equal(before[name][1], ours.weights[name][1])


def test_runs_in_the_middle_can_be_updated_alone():
    generator = torch.Generator().manual_seed(4)
    weights, gradients = draw(3, generator), draw(3, generator)
    apart = {name: weight.clone() for name, weight in weights.items()}
    AdamW(weights, DECAYS).step(gradients, RATES, [1, 1, 1])
    ours = AdamW(apart, DECAYS)
    for first in (1, 0, 2):
        own = {name: gradient[first : first + 1] for name, gradient in gradients.items()}
        ours.step(own, RATES[first : first + 1], [1], first)
    assert all(torch.equal(weights[name], apart[name]) for name in SHAPES)


def test_runs_that_are_kept_keep_their_state():
    generator = torch.Generator().manual_seed(3)
    ours = AdamW(draw(3, generator), DECAYS)
    ours.step(draw(3, generator), RATES, [1, 1, 1])
    second = {name: square[2].clone() for name, square in ours.squares.items()}
    ours.keep([2, 0])
    assert ours.decays == [0.3, 0.01]
    assert all(torch.equal(ours.squares[name][0], second[name]) for name in SHAPES)
