"""The routers of several runs as one set of tensors with a leading [R].

Owns the layout in which all of them are computed in two batched products, forth and back, and
folding what was done to the features into the weights. Leaves what a router is to
`models.routers`, whose results these are.

Inside, weights have the input's axis before the output's, so that gradients come out in the
layout of the weights.

Axes: R runs, B rows, D hidden, L layers, W windows, H router width, C = 3 decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from drllm.models.routers.stack import RouterConfig, RouterStack
from drllm.training.batches import Batch, Scale

Weights: TypeAlias = dict[str, Tensor]
"""`hidden_weight` `[R, L, D, H]`, `hidden_bias` `[R, L, H]`, `decision_weight` `[R, L, H, C]` and
`decision_bias` `[R, L, C]`; one run's have no R."""


def stacked(
    stacks: Sequence[RouterStack], dtype: torch.dtype, device: torch.device | str
) -> Weights:
    """Copy routers of equal shapes into one set of tensors."""
    runs = [_turned(dict(stack.state_dict())) for stack in stacks]
    return {
        name: torch.stack([run[name] for run in runs]).to(device=device, dtype=dtype)
        for name in runs[0]
    }


def unstacked(
    config: RouterConfig, weights: Mapping[str, Tensor], scale: Scale | None
) -> RouterStack:
    """Return one run's routers, which read features as they are.

    Args:
        config: Theirs.
        weights: One run's, in the layout of this module.
        scale: How the features were scaled in training, which the first layer takes over:
            W · (x − mean) / deviation + b is (W / deviation) · x + (b − W · mean / deviation).
    """
    plain = {name: weight.detach().cpu().double() for name, weight in weights.items()}
    if scale is not None:
        folded = plain["hidden_weight"] / scale.deviation[..., None]  # [L, D, H]
        shift = torch.einsum("ldh,ld->lh", folded, scale.mean)
        plain |= {"hidden_weight": folded, "hidden_bias": plain["hidden_bias"] - shift}
    with torch.device("meta"):  # no weights are drawn only to be replaced
        stack = RouterStack(config)
    tensors = {name: value.float() for name, value in _turned(plain).items()}
    stack.load_state_dict(tensors, assign=True)
    return stack


def logits(weights: Weights, batch: Batch, kept: Tensor | None = None) -> Tensor:
    """Return what the routers of R runs say, `[R, B, L, C]`.

    Args:
        weights: Of R runs.
        batch: For these runs.
        kept: `[R, B, L, H]`: factor of each hidden unit in each example; None for 1.
    """
    R, L, B, W, D = batch.means.shape
    H = weights["hidden_weight"].shape[-1]
    inner = torch.baddbmm(
        weights["hidden_bias"].reshape(R * L, 1, H),
        batch.means.view(R * L, B * W, D),
        weights["hidden_weight"].reshape(R * L, D, H),
    )  # [R * L, B * W, H]
    inner = F.gelu(inner, approximate="tanh").view(R, L, B, W, H)
    mean = (inner * batch.windows[:, None, :, :, None]).sum(dim=3)  # [R, L, B, H]
    if kept is not None:
        mean = mean * kept.transpose(1, 2)
    decided = torch.baddbmm(
        weights["decision_bias"].reshape(R * L, 1, -1),
        mean.reshape(R * L, B, H),
        weights["decision_weight"].reshape(R * L, H, -1),
    )  # [R * L, B, C]
    return decided.view(R, L, B, -1).transpose(1, 2)


def _turned(weights: Mapping[str, Tensor]) -> Weights:
    """Swap the last two axes of weights, not of biases: from routers to here and back."""
    return {
        name: value if name.endswith("bias") else value.transpose(-1, -2).contiguous()
        for name, value in weights.items()
    }
