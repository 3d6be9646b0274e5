"""What a route costs in arithmetic and in memory, derived from the shapes of the model's weights.

None of it is a measurement. Time is measured in `latency`, executions are counted in `drllm.cost`.

A multiplication and an addition are two FLOPs. Counted are products of matrices; norms,
activations, the softmax and rotations aren't. Each token attends to each one that is in reach of
the pass, those that the causal mask hides included, since the usual code computes them too.

Axes: L layers, T tokens, W windows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

from drllm.errors import ArchitectureError
from drllm.models.base.layers import base_of, find_layers
from drllm.models.routers.stack import NUM_DECISIONS, RouterConfig
from drllm.paths import Decisions, check_decisions
from drllm.records import results

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where configurations say that a layer has experts, of which a token runs a few."""
OTHER_ATTENTION = ("kv_lora_rank", "multi_query", "lambda_std_dev")
"""Where they say that attention is of another shape than heads times head size."""


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs by what they grow with.

    Attributes:
        weights: Products with weights: as many for each token, wherever it stands.
        attention: Scores and weighted values: for each token more, the more tokens it attends to.
    """

    weights: int
    attention: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.weights + other.weights, self.attention + other.attention)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a model that its cost is derived from.

    Attributes:
        matrices: For each layer, the entries of all matrices that it multiplies a token with,
            `[L]`.
        head: Entries of the output matrix.
        heads: Query heads.
        kv_heads: Heads of keys and values: fewer, where several query heads share one.
        head_size: Of a query, key or value.
        windows: For each layer the tokens that it sees, itself included; None for all, `[L]`.
        kv_itemsize: Bytes of a number in the cache.
    """

    matrices: tuple[int, ...]
    head: int
    heads: int
    kv_heads: int
    head_size: int
    windows: tuple[int | None, ...]
    kv_itemsize: int

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """Read the shape of a model; nothing is run.

        Matrices, and how many query heads share a head of keys, are taken from the model itself: a
        configuration doesn't say how many matrices an MLP has, and may hold what no layer reads.

        Args:
            model: A decoder-only model of transformers, routed or not, or a PEFT model around one.

        Raises:
            ArchitectureError: A model whose layers can't be found, or whose cost doesn't follow
                from these numbers: experts, latent K/V, packed weights.
        """
        _, layers = find_layers(model)
        model = base_of(model)
        name, config = type(model).__name__, model.config.get_text_config()
        for reason in (*EXPERTS, *OTHER_ATTENTION):
            if getattr(config, reason, None):
                raise ArchitectureError(
                    f"{name} has {reason} = {getattr(config, reason)}, for which FLOPs and K/V "
                    f"aren't derived; go by executions and measured time"
                )
        heads = int(config.num_attention_heads)
        entries = DynamicCache(config=model.config).layers
        return cls(
            matrices=tuple(_entries(layer, name) for layer in layers),
            head=int(model.get_output_embeddings().weight.numel()),
            heads=heads,
            kv_heads=heads // _sharing(layers),
            head_size=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            windows=tuple(getattr(entry, "sliding_window", None) for entry in entries),
            kv_itemsize=model.dtype.itemsize,
        )


def _sharing(layers: nn.ModuleList) -> int:
    """Return how many query heads share a head of keys and values."""
    found = {getattr(part, "num_key_value_groups", 1) for part in layers.modules()}
    return int(max(found))


def _entries(layer: nn.Module, model: str) -> int:
    """Count the entries of a layer's matrices."""
    total = 0
    for module in layer.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            if not isinstance(module, (nn.Linear, Conv1D)) or not parameter.is_floating_point():
                raise ArchitectureError(
                    f"{model} has weights in {type(module).__name__}, for which FLOPs aren't "
                    f"derived; go by executions and measured time"
                )
            total += parameter.numel()
    return total


def forward_flops(
    shape: ModelShape,
    decisions: Sequence[int],
    num_tokens: int,
    *,
    num_past: int = 0,
    num_logits: int = 1,
) -> Flops:
    """Return the FLOPs of one forward pass of one sequence.

    Args:
        shape: Of the model.
        decisions: `[L]`.
        num_tokens: T that this pass reads, from 1.
        num_past: Tokens whose K/V lie in the cache.
        num_logits: At how many positions next tokens are predicted: 1 where one is generated, T
            where a text is scored.

    Raises:
        PathError: Decisions that this model can't run.

    Source: the usual count (Kaplan et al. 2020, section 2.1), layer by layer as often as it runs.

    Example:
        >>> one_layer = ModelShape((100,), 50, heads=2, kv_heads=1, head_size=4, windows=(None,),
        ...                        kv_itemsize=4)
        >>> forward_flops(one_layer, [2], num_tokens=3)
        Flops(weights=1300, attention=576)
    """
    weights = 2 * num_logits * shape.head
    attention = 0
    checked = check_decisions(decisions, len(shape.matrices))
    for count, entries, window in zip(checked, shape.matrices, shape.windows, strict=True):
        reach = _kept(num_past, window) + num_tokens
        weights += count * 2 * num_tokens * entries
        # Two products for each pair of tokens: the score, and the value that it weights.
        attention += count * 4 * num_tokens * reach * shape.heads * shape.head_size
    return Flops(weights, attention)


def answer_flops(
    shape: ModelShape, decisions: Sequence[int], num_prompt_tokens: int, num_new_tokens: int
) -> tuple[Flops, Flops]:
    """Return the FLOPs of reading a prompt and of decoding its answer, one token a pass.

    Args:
        shape: Of the model.
        decisions: `[L]`, which hold for the whole answer.
        num_prompt_tokens: From 1.
        num_new_tokens: From 1; the first is given by the pass that reads the prompt.

    Returns:
        Prefill and decode.

    Raises:
        PathError: Decisions that this model can't run.
    """
    prefill = forward_flops(shape, decisions, num_prompt_tokens)
    decode = Flops(0, 0)
    for past in range(num_prompt_tokens, num_prompt_tokens + num_new_tokens - 1):
        decode += forward_flops(shape, decisions, 1, num_past=past)
    return prefill, decode


def kv_bytes(shape: ModelShape, decisions: Sequence[int], num_tokens: int = 1) -> int:
    """Return the bytes of K and V that one sequence keeps.

    A skipped layer keeps none, a repeated one keeps those of both passes.

    Args:
        shape: Of the model.
        decisions: `[L]`.
        num_tokens: Tokens read so far; 1 gives the bytes a token, as long as no layer has more
            tokens than it sees.

    Raises:
        PathError: Decisions that this model can't run.

    Example:
        >>> two_layers = ModelShape((9, 9), 5, heads=4, kv_heads=2, head_size=8,
        ...                         windows=(None, None), kv_itemsize=2)
        >>> kv_bytes(two_layers, [0, 2]), kv_bytes(two_layers, [1, 1], num_tokens=10)
        (128, 1280)
    """
    a_token = 2 * shape.kv_heads * shape.head_size * shape.kv_itemsize
    checked = check_decisions(decisions, len(shape.matrices))
    pairs = zip(checked, shape.windows, strict=True)
    return sum(count * _kept(num_tokens, window) * a_token for count, window in pairs)


def router_flops(config: RouterConfig, num_tokens: int) -> int:
    """Return the FLOPs of all routers on one prompt: windows, both matrices, every layer.

    Args:
        config: Of the routers.
        num_tokens: T of the prompt.
    """
    W, D, H = config.num_windows, config.hidden_size, config.router_width
    return config.num_layers * 2 * (W * num_tokens * D + W * D * H + H * NUM_DECISIONS)


def _kept(num_tokens: int, window: int | None) -> int:
    """Return the tokens of a layer in the cache: of a window all but the one read next."""
    return num_tokens if window is None else min(num_tokens, window - 1)


@dataclass(frozen=True, slots=True)
class PromptCost:
    """What reading the prompts of one task costs under the routes that a system took.

    Attributes:
        shape: Of the model; None where its cost doesn't follow from its matrices.
        num_tokens: Of each prompt.
        note: Why nothing is derived; empty where it is.
    """

    shape: ModelShape | None
    num_tokens: Sequence[int]
    note: str = ""

    @classmethod
    def of(cls, model: Any, num_tokens: Sequence[int]) -> PromptCost:
        """Read a model's shape, unless its cost can't be derived."""
        try:
            return cls(ModelShape.of(model), num_tokens)
        except ArchitectureError as error:
            return cls(None, num_tokens, str(error))

    def flops(self, draws: Sequence[Sequence[Decisions]]) -> results.Flops | None:
        """Return the mean FLOPs of reading a prompt and predicting one token.

        Args:
            draws: For each draw, every question's decisions; empty where a path can't be expressed
                by decisions.
        """
        if self.shape is None or not draws:
            return None
        flops = [
            forward_flops(self.shape, decisions, tokens)
            for draw in draws
            for decisions, tokens in zip(draw, self.num_tokens, strict=True)
        ]
        return results.Flops(
            weights=fmean(each.weights for each in flops),
            attention=fmean(each.attention for each in flops),
        )

    def kv_bytes(self, draws: Sequence[Sequence[Decisions]]) -> float | None:
        """Return the mean bytes of K and V that a token keeps in the cache; draws as in `flops`."""
        if self.shape is None or not draws:
            return None
        return fmean(kv_bytes(self.shape, decisions) for draw in draws for decisions in draw)
