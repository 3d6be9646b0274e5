"""What a router reads of a prompt: the mean of its hidden states in W contiguous windows.

Axes: B rows, T tokens, D hidden, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """A prompt as a router sees it.

    Attributes:
        means: `[B, W, D]` in float32: mean hidden state of each window, zeros past `filled`.
        filled: `[B]`: how many windows hold tokens, `min(T, W)`.
        are_all_filled: Whether every row fills all W.
    """

    means: Tensor
    filled: Tensor
    are_all_filled: bool = False


class Spans:
    """Where the windows of a batch's prompts lie.

    Window w holds the readable tokens floor(w·T/W) … floor((w+1)·T/W) − 1, counted without the
    padding; a row of T < W tokens has T windows of one token.

    Args:
        readable: `[B, T]` bool, the tokens that a router may read; at least one a row.
        num_windows: W.

    Source: Dr.LLM section 3.2; keeping the tail that doesn't fill a window is ours (D-03).
    """

    def __init__(self, readable: Tensor, num_windows: int) -> None:
        count = readable.sum(dim=1)  # [B]
        self.filled = count.clamp(max=num_windows)  # [B]
        rank = readable.cumsum(dim=1) - 1  # [B, T], position among the readable tokens
        # Token r lies in window w iff floor(w·n/W) <= r < floor((w+1)·n/W), with n tokens and W
        # windows filled. Integer arithmetic only: a float division would misplace tokens.
        edges = torch.arange(num_windows + 1, device=readable.device)  # [W + 1]
        starts = (edges * count[:, None]) // self.filled.clamp(min=1)[:, None]  # [B, W + 1]
        starts = torch.where(edges <= self.filled[:, None], starts, count[:, None])
        behind, ahead = starts[:, :-1, None], starts[:, 1:, None]
        inside = (rank[:, None, :] >= behind) & (rank[:, None, :] < ahead)
        inside = inside & readable[:, None, :]  # [B, W, T]
        self.shares = inside / inside.sum(dim=2, keepdim=True).clamp(min=1)  # [B, W, T]
        self.readable = readable
        self.is_all_readable = bool(readable.all())
        self.are_all_filled = bool((self.filled == num_windows).all())

    def means(self, hidden: Tensor) -> Windows:
        """Average a layer's input in each window, in float32.

        Args:
            hidden: `[B, T, D]`, any floating dtype; what isn't readable may hold anything, NaN too.

        Example:
            >>> spans = Spans(torch.ones(1, 4, dtype=torch.bool), num_windows=2)
            >>> spans.means(torch.arange(4.0).view(1, 4, 1)).means.flatten()
            tensor([0.5000, 2.5000])
        """
        clean = hidden.float()
        if not self.is_all_readable:
            # where(), not a product: 0 · NaN would leak what padding holds.
            clean = torch.where(self.readable[..., None], clean, 0.0)
        return Windows(torch.bmm(self.shares, clean), self.filled, self.are_all_filled)
