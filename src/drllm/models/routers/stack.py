"""The routers as a network: one small router per layer, all computed in one batch.

Each router reads the mean hidden state of the prompt's tokens in each of W contiguous windows.

Axes: B rows, T tokens, D hidden, L layers, W windows, H router width, C = 3 decisions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drllm.models.routers.config import RouterConfig

NUM_DECISIONS = 3


@dataclass(frozen=True, slots=True)
class Windows:
    """What the router of one layer reads from a batch of prompts."""

    means: Tensor  # [B, W, D] in float32: mean hidden state of each window, zeros past `filled`
    filled: Tensor  # [B]: number of windows that hold tokens
    are_all_filled: bool = False  # whether every row is known to fill all W windows


class Spans:
    """The places of the W windows in a batch of prompts.

    In a row with n readable tokens, window w holds the readable tokens floor(w·n/W) …
    floor((w+1)·n/W) − 1. A row of n < W tokens has n windows of one token.

    Args:
        readable: `[B, T]` bool, the tokens that a router may read; at least one in each row.
        num_windows: W.

    Source: Dr.LLM section 3.2; dropping no token at the end is ours (D-03).
    """

    def __init__(self, readable: Tensor, num_windows: int) -> None:
        count = readable.sum(dim=1)  # [B]
        self.filled = count.clamp(max=num_windows)  # [B]
        rank = readable.cumsum(dim=1) - 1  # [B, T], position among the readable tokens
        # Token r lies in window w iff floor(w·n/W) <= r < floor((w+1)·n/W), with n tokens and W
        # windows filled. Integer arithmetic only: a float division would misplace tokens.
        edges = torch.arange(num_windows + 1, device=readable.device)  # [W + 1]
        starts = (edges * count[:, None]) // self.filled.clamp(min=1)[:, None]  # [B, W + 1]
        # Windows past `filled` are empty: they start and end behind the last token.
        starts = torch.where(edges <= self.filled[:, None], starts, count[:, None])
        first = starts[:, :-1, None]  # [B, W, 1]
        end = starts[:, 1:, None]
        rank = rank[:, None, :]  # [B, 1, T]
        inside = (rank >= first) & (rank < end) & readable[:, None, :]  # [B, W, T]
        # The weight of each token in the mean of its window.
        self.shares = inside / inside.sum(dim=2, keepdim=True).clamp(min=1)  # [B, W, T]
        self.readable = readable
        # These two flags save a few steps in each layer. On an accelerator they stay False, since
        # the host would have to wait for them.
        is_on_cpu = readable.device.type == "cpu"
        self.is_all_readable = is_on_cpu and bool(readable.all())
        self.are_all_filled = is_on_cpu and bool((self.filled == num_windows).all())

    def means(self, hidden: Tensor) -> Windows:
        """Average a layer's input `[B, T, D]` in each window, in float32.

        The input may have any floating dtype. Unreadable tokens may hold anything, even NaN.
        """
        hidden = hidden.float()
        if not self.is_all_readable:
            # where(), not a product: 0 · NaN is NaN, so padding would change the mean.
            hidden = torch.where(self.readable[..., None], hidden, 0.0)
        return Windows(torch.bmm(self.shares, hidden), self.filled, self.are_all_filled)


class RouterStack(nn.Module):
    """One small router per layer: Linear(D→H), GELU, Linear(H→3), mean over windows.

    All L routers live in four stacked tensors, so that training evaluates them in two batched
    products. Weights are Xavier-uniform per layer, biases zero; everything is float32
    (docs/differences.md, D-33).

    Args:
        config: Shapes and the base model they belong to.
        generator: The random generator that the initial weights are drawn from.

    Source: Dr.LLM section 3.2 and appendix (bottleneck 128).

    Example:
        >>> stack = RouterStack(RouterConfig(num_layers=28, hidden_size=3072))
        >>> sum(weight.numel() for weight in stack.parameters())
        11024468
    """

    def __init__(self, config: RouterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        L = config.num_layers
        D = config.hidden_size
        H = config.router_width
        self.hidden_weight = nn.Parameter(torch.empty(L, H, D))
        self.hidden_bias = nn.Parameter(torch.zeros(L, H))
        self.decision_weight = nn.Parameter(torch.empty(L, NUM_DECISIONS, H))
        self.decision_bias = nn.Parameter(torch.zeros(L, NUM_DECISIONS))
        for stacked in (self.hidden_weight, self.decision_weight):
            for weight in stacked.data:
                nn.init.xavier_uniform_(weight, generator=generator)

    def forward(self, means: Tensor, filled: Tensor) -> Tensor:
        """Return the logits of every layer's router on its own input.

        Args:
            means: `[B, L, W, D]` windows of each layer's input.
            filled: `[B]` number of windows that hold tokens.

        Returns:
            `[B, L, 3]` logits: the mean over the filled windows.
        """
        B, L, W, D = means.shape
        H = self.config.router_width
        # Weights come first in the products, so that their gradients have the weights' layout.
        rows = means.transpose(0, 1).reshape(L, B * W, D)
        inner = torch.baddbmm(
            self.hidden_bias[..., None], self.hidden_weight, rows.transpose(1, 2)
        )  # [L, H, B * W]
        inner = nn.functional.gelu(inner, approximate="tanh").view(L, H, B, W)
        inner = _average_filled(inner, filled)  # [L, H, B]
        logits = torch.baddbmm(self.decision_bias[..., None], self.decision_weight, inner)
        return logits.permute(2, 0, 1)

    def layer_logits(self, layer: int, windows: Windows) -> Tensor:
        """Return the logits of one layer's router, `[B, 3]`, on the routers' device."""
        device = self.hidden_weight.device
        means = windows.means.to(device)
        filled = windows.filled.to(device)
        linear = nn.functional.linear
        inner = linear(means, self.hidden_weight[layer], self.hidden_bias[layer])  # [B, W, H]
        inner = nn.functional.gelu(inner, approximate="tanh").transpose(-1, -2)  # [B, H, W]
        if windows.are_all_filled:
            inner = inner.mean(dim=-1)  # saves four small steps in each layer
        else:
            inner = _average_filled(inner, filled[..., None])
        return linear(inner, self.decision_weight[layer], self.decision_bias[layer])


def _average_filled(values: Tensor, filled: Tensor) -> Tensor:
    """Average the last axis (W) over its first `filled` entries."""
    is_filled = torch.arange(values.shape[-1], device=values.device) < filled[..., None]
    return torch.where(is_filled, values, 0.0).sum(dim=-1) / filled
