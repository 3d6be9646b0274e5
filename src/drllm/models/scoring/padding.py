"""Stacks rows of different lengths, padded on the left, and takes the padding off again.

Axes: U rows, T tokens, D size of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stack_left_padded(parts: Sequence[Tensor], num_tokens: int = 0) -> Tensor:
    """Stack tensors `[..., T_i, D]`, padded on the left to the longest or to `num_tokens`."""
    lengths = [part.shape[-2] for part in parts]
    shortest = min(lengths)
    T = max(num_tokens, *lengths)
    if shortest == T:
        return torch.stack([*parts])
    # All paddings and parts are joined by a single `cat`, which is then cut into the parts. A GPU
    # takes as long to launch a small operation as a large one.
    zeros = parts[0].new_zeros(*parts[0].shape[:-2], T - shortest, parts[0].shape[-1])
    pieces = []
    for part, length in zip(parts, lengths, strict=True):
        pieces += [zeros[..., : T - length, :], part]
    whole = torch.cat(pieces, dim=-2)  # [..., U * T, D]
    return whole.view(*whole.shape[:-2], len(parts), T, -1).movedim(-3, 0)


def remove_padding(values: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """Return the last tokens of each row of `[U, ..., T, D]`, as parts of one new tensor."""
    parts = [row[..., -length:, :] for row, length in zip(values, lengths, strict=True)]
    return torch.split(torch.cat(parts, dim=-2), list(lengths), dim=-2)
