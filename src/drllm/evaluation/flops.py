"""FLOPs and K/V memory of a route, derived from the shapes of the model's weights.

Nothing here is measured. `latency` measures time, and `drllm.cost` counts executions.

A multiplication and an addition count as two FLOPs. Only matrix products count, not norms,
activations, the softmax or rotations. Every token attends to every token of the pass, even to
tokens that the causal mask hides, since the usual code computes their products too.

Axes: L layers, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from drllm.errors import ArchitectureError
from drllm.models.base.layers import find_layers, unwrap_peft
from drllm.models.routing.lora import LoraWeights
from drllm.paths import Plan, get_adapter, get_layers
from drllm.records.results import Flops

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of configurations that say how many experts a layer has."""
OTHER_ATTENTION = ("kv_lora_rank", "multi_query", "lambda_std_dev", "attention_hidden_size")
"""Fields of configurations whose attention has another shape than heads times head size."""
NOT_DERIVED = (*EXPERTS, *OTHER_ATTENTION)
"""Fields of models whose cost isn't derived: a token runs only some of a layer's experts, or the
attention is of another kind."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a model that its cost is derived from."""

    # The number of entries of all matrices that a layer multiplies a token with, [L].
    matrices: tuple[int, ...]
    head: int  # number of entries of the output matrix
    queries: int  # size of a token's queries, over all heads
    kv_bytes: int  # bytes of the keys and values that a layer keeps for a token
    # Name of an adapter → the number of entries that it adds to each layer, [L].
    adapters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, adapters: Mapping[str, LoraWeights] | None = None) -> "ModelShape":
        """Read the shape of a model of transformers, routed or not; nothing is run.

        The matrices, and how many query heads share a key head, are read from the model itself,
        since a configuration may have fields that no layer reads.

        Raises:
            ArchitectureError: The cost doesn't follow from these numbers (experts, latent K/V).
        """
        _, layers = find_layers(model)
        model = unwrap_peft(model)
        name = type(model).__name__
        config = model.config.get_text_config()
        for reason in NOT_DERIVED:
            if getattr(config, reason, None):
                raise ArchitectureError(
                    f"{name} has {reason} = {getattr(config, reason)}, for which FLOPs and K/V "
                    f"aren't derived; go by executions and measured time"
                )
        heads = int(config.num_attention_heads)
        num_groups = max(getattr(m, "num_key_value_groups", 1) for m in layers.modules())
        kv_heads = heads // num_groups
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        adapter_entries = {}
        for adapter, weights in (adapters or {}).items():
            adapter_entries[adapter] = tuple(map(weights.num_entries, range(len(layers))))
        return cls(
            matrices=tuple(_num_entries(layer) for layer in layers),
            head=int(model.get_output_embeddings().weight.numel()),
            queries=heads * head_size,
            kv_bytes=2 * kv_heads * head_size * model.dtype.itemsize,
            adapters=adapter_entries,
        )


def prompt_flops(shape: ModelShape, plan: Plan, num_tokens: int) -> Flops:
    """Return the FLOPs of reading one prompt of T ≥ 1 tokens in one pass, and predicting one token.

    Source: the usual count (Kaplan et al. 2020, section 2.1). A layer counts each time it runs.
    """
    layers = get_layers(plan)
    entries = sum(shape.matrices[layer] for layer in layers)
    adapter = get_adapter(plan)
    if adapter:
        entries += sum(shape.adapters[adapter][layer] for layer in layers)
    num_pairs = len(layers) * num_tokens * num_tokens
    return Flops(
        weights=2 * (shape.head + num_tokens * entries),
        # Two products for each pair of tokens: the score, and the value that it weights.
        attention=4 * num_pairs * shape.queries,
    )


def kv_bytes(shape: ModelShape, plan: Plan) -> int:
    """Return the bytes of keys and values that a token adds to the cache.

    A skipped layer adds none; a repeated layer adds those of both executions. The number holds
    while every layer still sees the token.
    """
    return shape.kv_bytes * len(get_layers(plan))


def _num_entries(layer: nn.Module) -> int:
    """Return the entries of all matrices that a layer multiplies a token with."""
    total = 0
    for name, module in layer.named_modules():
        if ".lora_" in name:  # counted only for paths that run with the adapter
            continue
        if isinstance(module, nn.Linear):  # its weight may be packed
            total += module.in_features * module.out_features
            continue
        for weight in module.parameters(recurse=False):
            if weight.dim() > 1:
                total += weight.numel()
    return total
