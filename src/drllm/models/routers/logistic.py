"""Logistic regression: linear maps that decide from a few numbers about a prompt.

Axes: N examples, D inputs, L decisions of an example, C classes of a decision.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
HELD_OUT = 0.2
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

    Least is the examples' mean cross-entropy, summed over their decisions, plus half the penalty
    times the squares of the map from inputs that are scaled to mean 0 and deviation 1. Biases are
    free, and an input that never varies isn't read. No class counts more than its examples do.

    Args:
        inputs: Of any scale; the map returned reads them as they are.
        labels: Classes, from 0.
        num_classes: C.
        weights: How much each example counts, `[N]`; all alike by default.
        penalty: By default the one of `PENALTIES` whose map fits a fifth of the examples best that
            it wasn't fitted on; it is fitted on all of them then.
    """
    N, read = len(inputs), inputs.double()
    weights = torch.ones(N) if weights is None else weights
    varies = read.amax(dim=0) > read.amin(dim=0)
    mean = read.mean(dim=0)
    deviation = torch.where(varies, read.std(dim=0, correction=0), torch.inf)
    scaled = (read - mean) / deviation

    def loss(linear: nn.Linear, counting: Tensor) -> Tensor:
        logits = linear(scaled).view(-1, num_classes)
        found = cross_entropy(logits, labels.flatten(), reduction="none").view(N, -1).sum(dim=1)
        total: Tensor = (counting * found).sum() / counting.sum().clamp(min=1e-9)
        return total

    def fit(penalty: float, counting: Tensor) -> nn.Linear:
        shape = inputs.shape[1], labels.shape[1] * num_classes
        linear: nn.Linear = nn.utils.skip_init(nn.Linear, *shape, dtype=torch.float64)  # type: ignore[no-untyped-call]
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
        lbfgs = torch.optim.LBFGS(linear.parameters(), **LBFGS)

        def step() -> Tensor:
            lbfgs.zero_grad()
            total = loss(linear, counting) + penalty / 2 * linear.weight.square().sum()
            total.backward()  # type: ignore[no-untyped-call]
            return total

        lbfgs.step(step)  # type: ignore[no-untyped-call]
        return linear.requires_grad_(False)

    if penalty is None:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        unseen = weights.index_fill(0, order[round(HELD_OUT * N) :], 0.0)
        penalty = min(PENALTIES, key=lambda one: float(loss(fit(one, weights - unseen), unseen)))
    linear = fit(penalty, weights)
    linear.weight.div_(deviation)
    linear.bias.sub_(linear.weight @ mean)
    return linear.float()
