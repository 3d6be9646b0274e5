"""The training loss: a focal loss, and class weights.

Axes: L layers, C = 3 decisions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def class_weights(counts: Sequence[float], beta: float) -> tuple[float, ...]:
    """Return the weight of each decision, the larger the rarer it is among the targets.

    The weight of a class with n labels is the inverse of its effective number
    (1 − βⁿ) / (1 − β), scaled so that the classes present have weights of mean 1. A class without
    labels has no effective number: it gets weight 1, that of an average class. No training label
    can meet that weight; it only prices the labels of a held-out part that has the class.

    β is in [0, 1): 0 gives equal weights, values near 1 inverse frequencies.

    Source: Cui et al. 2019 (arXiv 1901.05555), section 3; Dr.LLM section 3.3.
    """
    present = [count for count in counts if count > 0]

    def inverse(count: float) -> float:
        return (1 - beta) / (1.0 if beta == 0 else -math.expm1(count * math.log(beta)))

    mean = sum(map(inverse, present)) / len(present)
    return tuple(inverse(count) / mean if count > 0 else 1.0 for count in counts)


def focal_losses(logits: Tensor, labels: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Return −w_c · (1 − p_c)^γ · log p_c, `[...]`, in the dtype of logits `[..., C]`.

    p_c is the router's probability of decision c, the label. The weights `[C]`, of the same dtype,
    are not divided out. γ = 0 gives weighted cross-entropy.

    Source: Lin et al. 2017 (arXiv 1708.02002), equation 5; Dr.LLM section 3.3.
    """
    log_p = logits.log_softmax(dim=-1).gather(-1, labels[..., None]).squeeze(-1)
    # 1 − p from log p keeps its digits where p is near 1; the floor keeps the gradient of a power
    # below 1 finite where p is 1, and there log p = 0 makes the product 0 anyway.
    remaining = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -weights[labels] * remaining**gamma * log_p
