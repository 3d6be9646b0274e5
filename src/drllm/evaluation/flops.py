"""What a route costs in arithmetic and in memory, derived from the shapes of the model's weights.

None of it is a measurement. Time is measured in `latency`, executions are counted in `drllm.cost`.

A multiplication and an addition are two FLOPs. Counted are products of matrices; norms,
activations, the softmax and rotations aren't. Each token attends to each one that is in reach of
the pass, those that the causal mask hides included, since the usual code computes them too.

Axes: L layers, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from drllm.errors import ArchitectureError
from drllm.models.base.layers import base_of, find_layers
from drllm.models.routing.lora import LoraWeights
from drllm.paths import Plan, adapter_of, layers_of
from drllm.records.results import Flops

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where configurations say how many experts a layer has."""
NOT_DERIVED = (*EXPERTS, "kv_lora_rank", "multi_query", "lambda_std_dev")
"""Where configurations say that a layer has experts, of which a token runs a few, or attention of
another shape than heads times head size."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a model that its cost is derived from."""

    # The entries of all matrices that a layer multiplies a token with, `[L]`.
    matrices: tuple[int, ...]
    head: int  # entries of the output matrix
    queries: int  # numbers in a token's queries, those of all heads
    kv_bytes: int  # of the keys and values that a layer keeps of a token
    # By name, the entries that an adapter adds to each layer, `[L]`.
    adapters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, adapters: Mapping[str, LoraWeights] | None = None) -> "ModelShape":
        """Read the shape of a model of transformers, routed or not; nothing is run.

        Matrices, and how many query heads share a head of keys, are taken from the model itself,
        since a configuration may hold what no layer reads. A model whose cost doesn't follow from
        these numbers (experts, latent K/V) is an ArchitectureError.
        """
        _, layers = find_layers(model)
        model = base_of(model)
        name, config = type(model).__name__, model.config.get_text_config()
        for reason in NOT_DERIVED:
            if getattr(config, reason, None):
                raise ArchitectureError(
                    f"{name} has {reason} = {getattr(config, reason)}, for which FLOPs and K/V "
                    f"aren't derived; go by executions and measured time"
                )
        heads = int(config.num_attention_heads)
        kv_heads = heads // max(getattr(m, "num_key_value_groups", 1) for m in layers.modules())
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(
            matrices=tuple(_num_entries(layer) for layer in layers),
            head=int(model.get_output_embeddings().weight.numel()),
            queries=heads * head_size,
            kv_bytes=2 * kv_heads * head_size * model.dtype.itemsize,
            adapters={
                name: tuple(map(weights.num_entries, range(len(layers))))
                for name, weights in (adapters or {}).items()
            },
        )


def prompt_flops(shape: ModelShape, plan: Plan, num_tokens: int) -> Flops:
    """Return the FLOPs of reading one prompt of T ≥ 1 tokens in one pass, and predicting one token.

    Source: the usual count (Kaplan et al. 2020, section 2.1), layer by layer as often as it runs.
    """
    layers = layers_of(plan)
    entries = sum(shape.matrices[layer] for layer in layers)
    if adapter := adapter_of(plan):
        entries += sum(shape.adapters[adapter][layer] for layer in layers)
    # Two products for each pair of tokens: the score, and the value that it weights.
    pairs = len(layers) * num_tokens * num_tokens
    return Flops(
        weights=2 * (shape.head + num_tokens * entries), attention=4 * pairs * shape.queries
    )


def kv_bytes(shape: ModelShape, plan: Plan) -> int:
    """Return the bytes of K and V that a token leaves, as long as every layer still sees it.

    A skipped layer keeps none; a repeated one keeps those of both passes.
    """
    return shape.kv_bytes * len(layers_of(plan))


def _num_entries(layer: nn.Module) -> int:
    """Return the entries of all matrices that a layer multiplies a token with."""
    total = 0
    for name, module in layer.named_modules():
        if ".lora_" in name:  # counted for the paths that run with it
            continue
        if isinstance(module, nn.Linear):  # its weight may be packed
            total += module.in_features * module.out_features
            continue
        for weight in module.parameters(recurse=False):
            if weight.dim() > 1:
                total += weight.numel()
    return total
