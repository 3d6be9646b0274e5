"""The routers as a network: one small one per layer, all computed in one batch.

Each reads the mean of the prompt's hidden states in W contiguous windows.

Axes: B rows, T tokens, D hidden, L layers, W windows, H router width, C = 3 decisions.
"""

import dataclasses
import reprlib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from drllm.errors import ConfigError
from drllm.models.base.prompts import PromptForm
from drllm.records.codec import worded

NUM_DECISIONS = 3
ROUTER_WIDTH = 128

Size = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Which routers these are and for which base model; saved as `router_config.json`.

    Attributes:
        num_layers: L of the base model.
        hidden_size: D of the base model.
        num_windows: W.
        router_width: H.
        base_model: Hub id, alias or path of the base model.
        base_revision: Its revision, where known.
        base_class: Class name of the base model.
        base_fingerprint: Hash over three named weight tensors of the base model.
        label_counts: `[L][3]`: how often each decision was the target at each layer in training;
            empty where the routers weren't trained on targets.
        training: Settings and final metrics, for the reader. Only `rewards`, the rewards that the
            prompts trained on were made for, and `prompt_form`, how these were put, are
            interpreted.

    Raises:
        ConfigError: A value of another kind, or a size below 1.
    """

    num_layers: Size
    hidden_size: Size
    num_windows: Size = 8
    router_width: Size = ROUTER_WIDTH
    base_model: str = ""
    base_revision: str | None = None
    base_class: str = ""
    base_fingerprint: str = ""
    label_counts: tuple[tuple[Count, Count, Count], ...] = ()
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, msgspec.convert(value, kind))
            except msgspec.ValidationError as error:
                said = f"{name!r}: {worded(error)}; it is {reprlib.repr(value)}"
                raise ConfigError(said) from error
        if len(self.label_counts) not in (0, self.num_layers):
            raise ConfigError("'label_counts' isn't num_layers rows of 3 counts")

    @classmethod
    def from_pretrained(cls, routers: Path | str, **options: Any) -> "RouterConfig":
        """Read the config of routers, without their weights; see `RoutedModel.from_pretrained`."""
        from drllm.models.routers import checkpoint, hub

        return checkpoint.read_config(hub.find(routers, **options))

    @property
    def prompt_form(self) -> PromptForm | None:
        """How the prompts trained on were put; None where that isn't known."""
        try:
            return msgspec.convert(self.training.get("prompt_form"), PromptForm | None)
        except msgspec.ValidationError as error:
            raise ConfigError(f"'training.prompt_form': {worded(error)}") from error


@dataclass(frozen=True, slots=True)
class Windows:
    """A prompt as a router sees it."""

    means: Tensor  # [B, W, D] in float32: mean hidden state of each window, zeros past `filled`
    filled: Tensor  # [B], how many windows hold tokens, min(T, W)
    are_all_filled: bool = False  # whether every row is known to fill all W


class Spans:
    """Where the W windows of a batch's prompts lie.

    Window w holds the readable tokens floor(w·T/W) … floor((w+1)·T/W) − 1, counted without the
    padding; a row of T < W tokens has T windows of one token. Readable, `[B, T]` bool, are the
    tokens that a router may read; at least one a row.

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
        # Known, some steps a layer are spared; but to know it, another device is waited for.
        is_here = readable.device.type == "cpu"
        self.is_all_readable = is_here and bool(readable.all())
        self.are_all_filled = is_here and bool((self.filled == num_windows).all())

    def means(self, hidden: Tensor) -> Windows:
        """Average a layer's input `[B, T, D]`, of any floating dtype, in each window, in float32.

        What isn't readable may hold anything, NaN too.
        """
        clean = hidden.float()
        if not self.is_all_readable:
            # where(), not a product: 0 · NaN would leak what padding holds.
            clean = torch.where(self.readable[..., None], clean, 0.0)
        return Windows(torch.bmm(self.shares, clean), self.filled, self.are_all_filled)


class RouterStack(nn.Module):
    """One small router per layer: Linear(D→H), GELU, Linear(H→3), mean over windows.

    All L routers live in four stacked tensors, so that training evaluates them in two batched
    products. Weights are Xavier-uniform per layer, biases zero; everything is float32
    (docs/differences.md, D-33).

    Args:
        config: Shapes and the base model they belong to.
        generator: Source of the initial weights.

    Source: Dr.LLM section 3.2 and appendix (bottleneck 128).

    Example:
        >>> stack = RouterStack(RouterConfig(num_layers=28, hidden_size=3072))
        >>> sum(weight.numel() for weight in stack.parameters())
        11024468
    """

    def __init__(self, config: RouterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        L, D, H = config.num_layers, config.hidden_size, config.router_width
        self.hidden_weight = nn.Parameter(torch.empty(L, H, D))
        self.hidden_bias = nn.Parameter(torch.zeros(L, H))
        self.decision_weight = nn.Parameter(torch.empty(L, NUM_DECISIONS, H))
        self.decision_bias = nn.Parameter(torch.zeros(L, NUM_DECISIONS))
        for stacked in (self.hidden_weight, self.decision_weight):
            for weight in stacked.data:
                nn.init.xavier_uniform_(weight, generator=generator)

    def forward(self, means: Tensor, filled: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the logits of every layer's router on its own input.

        Args:
            means: `[B, L, W, D]` windows of each layer's input.
            filled: `[B]` windows that hold tokens.
            kept: `[B, L, H]` dropout's factors of the hidden units; None for 1.

        Returns:
            `[B, L, 3]` logits: the mean over the filled windows.
        """
        (B, L, W, _), bias = means.shape, self.hidden_bias[..., None]
        # The weights stand first, so that their gradients have their layout and aren't copied.
        rows = means.transpose(0, 1).reshape(L, B * W, -1)
        inner = torch.baddbmm(bias, self.hidden_weight, rows.transpose(1, 2))
        inner = nn.functional.gelu(inner, approximate="tanh").view(L, bias.shape[1], B, W)
        inner = _mean_over_filled(inner, filled)  # [L, H, B]
        if kept is not None:
            inner = inner * kept.permute(1, 2, 0)
        logits = torch.baddbmm(self.decision_bias[..., None], self.decision_weight, inner)
        return logits.permute(2, 0, 1)

    def layer_logits(self, layer: int, windows: Windows) -> Tensor:
        """Return the logits of one layer's router, `[B, 3]`, wherever that layer itself runs."""
        linear, device = nn.functional.linear, self.hidden_weight.device
        means, filled = windows.means.to(device), windows.filled.to(device)
        inner = linear(means, self.hidden_weight[layer], self.hidden_bias[layer])  # [B, W, H]
        inner = nn.functional.gelu(inner, approximate="tanh").transpose(-1, -2)  # [B, H, W]
        # A plain mean spares four small steps a layer.
        whole = windows.are_all_filled
        inner = inner.mean(dim=-1) if whole else _mean_over_filled(inner, filled[..., None])
        return linear(inner, self.decision_weight[layer], self.decision_bias[layer])


def _mean_over_filled(values: Tensor, filled: Tensor) -> Tensor:
    """Average the last axis (W) over its first `filled` entries."""
    present = torch.arange(values.shape[-1], device=values.device) < filled[..., None]
    return torch.where(present, values, 0.0).sum(dim=-1) / filled
