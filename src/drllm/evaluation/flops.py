"""FLOPs and K/V memory of a plan, derived from the shapes of the model's weights.

Nothing here is measured. `latency` measures time, and `drllm.cost` counts executions.

A multiplication and an addition count as two FLOPs. Only matrix products count, not norms,
activations, the softmax or rotations. Every token attends to every token of the pass. This includes
tokens that the causal mask hides, since the usual code computes their products too.

Axes: L layers, T tokens.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import nn

from drllm.errors import ArchitectureError
from drllm.model.layers import find_layers, unwrap_peft
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.core import Routing
from drllm.paths import Plan, get_layers
from drllm.records.results import Flops

EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of configurations that say how many experts a layer has. A token runs only some of them,
so the cost of a token isn't derived."""
OTHER_ATTENTION_FIELDS = ("kv_lora_rank", "multi_query", "lambda_std_dev", "attention_hidden_size")
"""Fields of configurations whose attention has another shape than heads times head size."""
UNSUPPORTED_FIELDS = (*EXPERT_FIELDS, *OTHER_ATTENTION_FIELDS)
"""A model whose configuration sets one of these fields is refused."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model's parts, from which its cost is derived.

    The entries of a matrix are its numbers. Multiplying a token with the matrix takes one
    multiplication and one addition for each entry.

    Attributes:
        layer_entries: For each layer the entries of all its matrices, `[L]`.
        head_entries: The entries of the output matrix.
        query_size: The size of a token's queries, over all heads of a layer.
        kv_bytes_per_layer: The bytes of the keys and values that a layer keeps for a token.
        bypass_entries: The entries of the bypass of a skipped layer; 0 without a bypass.
    """

    layer_entries: tuple[int, ...]
    head_entries: int
    query_size: int
    kv_bytes_per_layer: int
    bypass_entries: int = 0

    @classmethod
    def from_model(cls, model: Any, bypass: Bypass | None = None) -> "ModelShape":
        """Read the shape of a model of transformers, routed or not, without running it.

        The matrices, and how many query heads share a key head, are read from the model itself,
        since a configuration may have fields that no layer reads.

        Args:
            model: The model.
            bypass: What runs in place of a skipped layer; None for nothing.

        Raises:
            ArchitectureError: The cost doesn't follow from these sizes (experts, latent K/V, a
                recurrent state).
        """
        _, layers = find_layers(model)
        model = unwrap_peft(model)
        _refuse_unsupported(model)
        config = model.config.get_text_config()
        heads = int(config.num_attention_heads)
        queries_per_key = max(getattr(m, "num_key_value_groups", 1) for m in layers.modules())
        kv_heads = heads // queries_per_key
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(
            layer_entries=tuple(_count_entries(layer) for layer in layers),
            head_entries=int(model.get_output_embeddings().weight.numel()),
            query_size=heads * head_size,
            kv_bytes_per_layer=2 * kv_heads * head_size * model.dtype.itemsize,
            bypass_entries=0 if bypass is None else 2 * bypass.rank * bypass.hidden_size,
        )


def count_bypass_cost(routed: Routing) -> float:
    """Return what a skipped layer costs under the model's bypass, in layer equivalents.

    It is the mean over the layers of the multiply-adds of a token in the bypass, as a share of
    those in the matrices of the layer. Without a bypass it is 0.
    """
    if routed.bypass is None:
        return 0.0
    entries = 2 * routed.bypass.rank * routed.bypass.hidden_size
    _, layers = find_layers(routed.model)
    return fmean(entries / _count_entries(layer) for layer in layers)


def prompt_flops(shape: ModelShape, plan: Plan, num_tokens: int) -> Flops:
    """Return the FLOPs of reading one prompt in one pass and predicting one token.

    A layer counts each time it runs.

    Args:
        shape: The model's shape.
        plan: The decisions or the static path that the prompt runs under.
        num_tokens: The length T of the prompt, at least 1.

    Source: the usual count (Kaplan et al. 2020, section 2.1).
    """
    layers = get_layers(plan)
    entries = sum(shape.layer_entries[layer] for layer in layers)
    num_skipped = len(shape.layer_entries) - len(set(layers))
    entries += num_skipped * shape.bypass_entries
    num_pairs = len(layers) * num_tokens * num_tokens
    return Flops(
        # The output matrix reads the last token only.
        weights=2 * (shape.head_entries + num_tokens * entries),
        # Two products for each pair of tokens: the score, and the value that it weights.
        attention=4 * num_pairs * shape.query_size,
    )


def kv_bytes(shape: ModelShape, plan: Plan) -> int:
    """Return the bytes of keys and values that a token adds to the cache.

    A skipped layer adds none, and a repeated layer adds those of both executions. A layer with a
    sliding window drops tokens outside the window; this isn't subtracted.
    """
    return shape.kv_bytes_per_layer * len(get_layers(plan))


def _refuse_unsupported(model: Any) -> None:
    """Raise ArchitectureError if a model's class or configuration has a cost that isn't derived."""
    name = type(model).__name__
    # Layers with a recurrent state run other products than attention does, or no attention at all.
    # Not every version of transformers says so in the configuration.
    if getattr(model, "_is_stateful", False):
        raise ArchitectureError(
            f"{name} keeps a recurrent state in its layers, for which FLOPs and K/V aren't "
            f"derived; go by executions and measured time"
        )
    config = model.config.get_text_config()
    for field_name in UNSUPPORTED_FIELDS:
        value = getattr(config, field_name, None)
        if value:
            raise ArchitectureError(
                f"{name} has {field_name} = {value}, for which FLOPs and K/V aren't derived; go by "
                f"executions and measured time"
            )


def _count_entries(layer: nn.Module) -> int:
    """Count the entries of all matrices that a layer multiplies a token with."""
    total = 0
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            # The sizes and not the weight, which may be packed if it is quantised.
            total += module.in_features * module.out_features
            continue
        for weight in module.parameters(recurse=False):
            if weight.dim() > 1:
                total += weight.numel()
    return total
