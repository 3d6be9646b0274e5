import math

import pytest
import torch

from drllm.training.losses import compute_class_weights, compute_focal_losses

EXACT = 1e-12  # float64: only the order of additions differs
WEIGHTS = torch.tensor([0.7, 0.2, 2.1], dtype=torch.float64)


def slow_class_weights(counts: list[int], beta: float) -> list[float]:
    """The effective number as the geometric series it is the sum of."""
    numbers = [sum(beta**power for power in range(count)) for count in counts]
    inverse = [1 / number if number else None for number in numbers]
    present = [value for value in inverse if value is not None]
    mean = sum(present) / len(present)
    return [1.0 if value is None else value / mean for value in inverse]


def slow_focal_loss(logits, labels, weights, gamma) -> float:
    losses = []
    rows = logits.flatten(0, 1).tolist()
    for three, label in zip(rows, labels.flatten().tolist(), strict=True):
        p = math.exp(three[label]) / sum(map(math.exp, three))
        losses.append(-weights[label] * (1 - p) ** gamma * math.log(p))
    return sum(losses) / len(losses)


def focal_loss(logits, labels, weights, gamma):
    """The mean over layers and rows for hard labels."""
    return compute_focal_losses(logits, labels, weights.to(logits.dtype), gamma).mean()


def batch(seed: int = 0, rows: int = 5, layers: int = 4):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, layers, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (rows, layers), generator=generator)
    return logits, labels


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999999])
@pytest.mark.parametrize("counts", [[1190, 6558, 22], [1, 1, 1], [3, 700, 1], [0, 40, 2]])
def test_class_weights_equal_the_sum_of_the_geometric_series(counts, beta):
    # The series itself adds up thousands of rounded terms.
    assert slow_class_weights(counts, beta) == pytest.approx(
        compute_class_weights(counts, beta), rel=1e-11
    )


def test_a_class_without_labels_gets_weight_one_and_leaves_the_others_alone():
    skip, execute, repeat = compute_class_weights([5, 100, 0], beta=0.99)
    assert execute < repeat == 1.0 < skip
    assert list(compute_class_weights([5, 100], beta=0.99)) == [skip, execute]
    assert (skip + execute) / 2 == pytest.approx(1.0, abs=EXACT)
    assert compute_class_weights([0, 30, 0], beta=0.999) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_equals_the_slow_loop(gamma):
    logits, labels = batch()
    loss = focal_loss(logits, labels, WEIGHTS, gamma)
    assert slow_focal_loss(logits, labels, WEIGHTS.tolist(), gamma) == pytest.approx(
        float(loss), abs=EXACT
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_equal_finite_differences(gamma):
    logits, labels = batch(seed=2, rows=2, layers=2)
    logits.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, labels, WEIGHTS, gamma), (logits,))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_certain_routers_have_finite_loss_and_gradient(gamma, size):
    logits = torch.tensor([[[size, 0.0, 0.0], [0.0, size, 0.0]]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[0, 2]]), torch.ones(3), gamma)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(size / 2, rel=1e-6)
    assert bool(logits.grad.isfinite().all())


def test_the_loss_keeps_the_dtype_of_the_logits():
    logits, labels = batch()
    loss = focal_loss(logits.float(), labels, torch.ones(3, dtype=torch.float64), gamma=2.0)
    assert loss.dtype == torch.float32
