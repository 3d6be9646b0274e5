"""The training loss: a focal loss with class weights.

Axes: L layers, C = 3 decisions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def compute_class_weights(counts: Sequence[float], beta: float) -> tuple[float, ...]:
    """Return the weight of each decision; rare decisions get larger weights.

    The weight of a class with n labels is the inverse of its effective number
    (1 − βⁿ) / (1 − β), scaled so that the classes present have weights of mean 1. A class without
    labels has no effective number, so it gets weight 1, the weight of an average class. This weight
    only matters if held-out targets have the label.

    Args:
        counts: `[C]` numbers of labels of each class.
        beta: In [0, 1): 0 gives equal weights, and values near 1 give inverse frequencies.

    Source: Cui et al. 2019 (arXiv 1901.05555), section 3; Dr.LLM section 3.3.
    """
    inverses = [_invert_effective_number(count, beta) for count in counts if count > 0]
    mean = sum(inverses) / len(inverses)
    weights = []
    for count in counts:
        weight = _invert_effective_number(count, beta) / mean if count > 0 else 1.0
        weights.append(weight)
    return tuple(weights)


def _invert_effective_number(count: float, beta: float) -> float:
    """Return (1 − β) / (1 − βⁿ), exact for β near 1."""
    if beta == 0:
        return 1.0
    return (1 - beta) / -math.expm1(count * math.log(beta))


def compute_focal_losses(logits: Tensor, labels: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Return −w_c · (1 − p_c)^γ · log p_c, `[...]`, in the dtype of logits `[..., C]`.

    p_c is the router's probability of decision c, the label. The loss isn't divided by the weights.

    Args:
        logits: `[..., C]`.
        labels: `[...]` decisions.
        weights: `[C]` class weights, in the dtype of the logits.
        gamma: γ; 0 gives weighted cross-entropy.

    Source: Lin et al. 2017 (arXiv 1708.02002), equation 5; Dr.LLM section 3.3.
    """
    log_p = logits.log_softmax(dim=-1).gather(-1, labels[..., None]).squeeze(-1)
    # 1 − p is computed from log p, so that it keeps its digits if p is near 1. The minimum keeps
    # the gradient finite if p is 1 and gamma is below 1. The loss is 0 there, since log p is 0.
    remaining = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -weights[labels] * remaining**gamma * log_p
