"""The training loss: a focal loss with class weights. The classes are the C = 3 decisions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def compute_class_weights(counts: Sequence[float], beta: float) -> tuple[float, ...]:
    """Return the weight of each decision, `[C]`; rare decisions get larger weights.

    A decision with n labels has the effective number (1 − βⁿ) / (1 − β). Its weight is the inverse
    of this number, scaled so that the mean weight is 1. A decision without labels is left out of
    the mean and gets weight 1. Its weight matters only if a held-out target has this label.

    Args:
        counts: `[C]`, how many labels each decision has.
        beta: In [0, 1): 0 gives equal weights; near 1 the weights are inverse to the counts.

    Source: Cui et al. 2019 (arXiv 1901.05555), section 3; Dr.LLM section 3.3.
    """
    inverses = [_invert_effective_number(count, beta) for count in counts if count > 0]
    mean = sum(inverses) / len(inverses)
    weights = []
    for count in counts:
        weight = 1.0
        if count > 0:
            weight = _invert_effective_number(count, beta) / mean
        weights.append(weight)
    return tuple(weights)


def _invert_effective_number(count: float, beta: float) -> float:
    """Return (1 − β) / (1 − βⁿ) for n = `count`."""
    if beta == 0:
        return 1.0
    # 1 − βⁿ as −expm1(n · ln β), which stays accurate for β near 1.
    return (1 - beta) / -math.expm1(count * math.log(beta))


def compute_focal_losses(logits: Tensor, labels: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Return the loss of each label, −w · (1 − p)^γ · log p, `[...]`.

    Here p is the probability that the logits give to the label, and w is the weight of the label.

    Args:
        logits: `[..., C]`, the routers' outputs.
        labels: `[...]`, the decisions to learn.
        weights: `[C]`, the class weights, in the dtype of the logits.
        gamma: γ; 0 gives weighted cross-entropy.

    Source: Lin et al. 2017 (arXiv 1708.02002), equation 5; Dr.LLM section 3.3.
    """
    log_p = logits.log_softmax(dim=-1).gather(-1, labels[..., None]).squeeze(-1)
    # 1 − p is computed from log p, so that it stays accurate for p near 1.
    one_minus_p = -torch.expm1(log_p)
    # With p = 1 and gamma < 1 the gradient of its power would be infinite. The smallest positive
    # number keeps it finite. The loss is still 0, since log p is 0.
    one_minus_p = one_minus_p.clamp(min=torch.finfo(log_p.dtype).tiny)
    return -weights[labels] * one_minus_p**gamma * log_p
