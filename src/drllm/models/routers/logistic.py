"""Logistic regression: fits linear maps that decide from a few numbers about a prompt.

Axes: N examples, D inputs, L decisions of an example, C classes of a decision.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # to choose from, the strongest first
HELD_OUT = 0.2  # share of the examples that the penalty is chosen on
LBFGS: Any = {"max_iter": 200, "tolerance_grad": 1e-5, "line_search_fn": "strong_wolfe"}


def fit_logistic(
    inputs: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    weights: Tensor | None = None,
    penalty: float | None = None,
) -> nn.Linear:
    """Fit a linear map from inputs `[N, D]` to the logits `[N, L · C]` of labels `[N, L]`.

    Inputs are scaled to mean 0 and deviation 1 for the fit. The objective is the cross-entropy,
    summed over an example's decisions and averaged over examples, plus half the penalty times the
    sum of the squared weights. Biases aren't penalised, classes aren't weighted, and an input that
    never varies gets weight 0.

    Args:
        inputs: Inputs of any scale; the returned map takes unscaled inputs.
        labels: Classes, counted from 0.
        num_classes: C, the same for every decision.
        weights: Weight of each example, `[N]`; all equal by default.
        penalty: Weight of the penalty. None chooses, among `PENALTIES`, the penalty with which the
            map fits a held-out fifth of the examples best. The map is then fitted on all examples.
    """
    num_examples = len(inputs)
    if weights is None:
        weights = torch.ones(num_examples)
    values = inputs.double()
    varies = values.amax(dim=0) > values.amin(dim=0)
    mean = values.mean(dim=0)
    deviation = torch.where(varies, values.std(dim=0, correction=0), torch.inf)
    scaled = (values - mean) / deviation  # 0 if an input never varies
    if penalty is None:
        penalty = _choose_penalty(scaled, labels, num_classes, weights)
    linear = _fit(scaled, labels, num_classes, weights, penalty)
    # Build the scaling into the map, so that it takes unscaled inputs.
    linear.weight.div_(deviation)
    linear.bias.sub_(linear.weight @ mean)
    return linear.float()


def _choose_penalty(inputs: Tensor, labels: Tensor, num_classes: int, weights: Tensor) -> float:
    """Return the penalty whose map fits held-out examples best."""
    num_examples = len(inputs)
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(0))
    num_held_out = round(HELD_OUT * num_examples)
    held_out = weights.index_fill(0, order[num_held_out:], 0.0)  # 0 for examples to fit on
    fitted = weights - held_out  # 0 for held-out examples

    def compute_held_out_loss(penalty: float) -> float:
        linear = _fit(inputs, labels, num_classes, fitted, penalty)
        return float(_compute_loss(linear, inputs, labels, num_classes, held_out))

    return min(PENALTIES, key=compute_held_out_loss)


def _fit(
    inputs: Tensor, labels: Tensor, num_classes: int, weights: Tensor, penalty: float
) -> nn.Linear:
    """Fit a map in float64 from scaled inputs; see `fit_logistic`."""
    num_logits = labels.shape[1] * num_classes
    linear: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, inputs.shape[1], num_logits, dtype=torch.float64
    )
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), **LBFGS)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = _compute_loss(linear, inputs, labels, num_classes, weights)
        loss = loss + penalty / 2 * linear.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(step)  # type: ignore[no-untyped-call]
    return linear.requires_grad_(False)


def _compute_loss(
    linear: nn.Linear, inputs: Tensor, labels: Tensor, num_classes: int, weights: Tensor
) -> Tensor:
    """Return the weighted mean, over examples, of the cross-entropy summed over decisions."""
    logits = linear(inputs).view(-1, num_classes)
    losses = cross_entropy(logits, labels.flatten(), reduction="none")
    losses = losses.view(len(inputs), -1).sum(dim=1)  # [N]
    total: Tensor = (weights * losses).sum() / weights.sum().clamp(min=1e-9)
    return total
