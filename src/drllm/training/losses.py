"""The training objective: focal loss over decisions, weighted by how rare each decision is.

Owns the two formulas. Leaves to `loop` which examples they are applied to and where the counts
come from: always the targets themselves, never numbers typed in.

Axes: B rows, L layers, C = 3 decisions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def class_weights(counts: Sequence[int], beta: float) -> tuple[float, ...]:
    """Return the weight of each decision, the larger the rarer it is among the targets.

    The weight of a class with n labels is the inverse of its effective number
    (1 − βⁿ) / (1 − β), scaled so that the classes present have weights of mean 1. A class without
    labels has no effective number: it gets weight 1, that of an average class. No training label
    can meet that weight; it only prices the labels of a held-out part that has the class.

    Args:
        counts: Labels of each class.
        beta: β in [0, 1); 0 gives equal weights, values near 1 inverse frequencies.

    Returns:
        One weight per class.

    Raises:
        ValueError: No class has a label.

    Source: Cui et al. 2019 (arXiv 1901.05555), section 3; Dr.LLM section 3.3.

    Example:
        >>> [round(weight, 3) for weight in class_weights([4399, 120956, 1457], 0.999)]
        [0.916, 0.905, 1.179]
    """
    present = [count for count in counts if count > 0]
    if not present:
        raise ValueError(f"no class has a label in {list(counts)}")
    inverse = {count: (1 - beta) / _one_minus_power(beta, count) for count in present}
    mean = sum(inverse[count] for count in present) / len(present)
    return tuple(inverse[count] / mean if count > 0 else 1.0 for count in counts)


def focal_loss(logits: Tensor, labels: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Return the mean over all layers and rows of −w_c · (1 − p_c)^γ · log p_c.

    c is the label and p_c the probability that the router gives it. The mean is a plain one: the
    weights are not divided out.

    Args:
        logits: `[B, L, C]`.
        labels: `[B, L]` of 0, 1, 2.
        weights: `[C]`, from `class_weights`.
        gamma: γ; 0 gives weighted cross-entropy.

    Returns:
        A scalar in the dtype of the logits.

    Source: Lin et al. 2017 (arXiv 1708.02002), equation 5; Dr.LLM section 3.3.

    Example:
        >>> focal_loss(torch.zeros(1, 1, 3), torch.tensor([[1]]), torch.ones(3), gamma=0.0)
        tensor(1.0986)
    """
    log_p = logits.log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]  # [B, L]
    # 1 − p from log p keeps its digits where p is near 1; the floor keeps the gradient of a power
    # below 1 finite where p is 1, and there log p = 0 makes the product 0 anyway.
    remaining = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    weight = weights.to(log_p.dtype).to(log_p.device)[labels]  # in this order: MPS has no float64
    return -(weight * remaining**gamma * log_p).mean()


def _one_minus_power(beta: float, count: int) -> float:
    return 1.0 if beta == 0 else -math.expm1(count * math.log(beta))
