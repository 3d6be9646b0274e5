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

from drllm.cost import Shares, step_executions
from drllm.errors import ArchitectureError
from drllm.models.base.layers import base_of, find_layers
from drllm.models.routing.adapters import Adapter
from drllm.models.routing.shares import EXPERTS, entries_of
from drllm.paths import MLP, Plan, step_of, steps_of
from drllm.records.results import Flops

NOT_DERIVED = (*EXPERTS, "kv_lora_rank", "multi_query", "lambda_std_dev")
"""Where configurations say that a layer has experts, of which a token runs a few, or attention of
another shape than heads times head size."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a model that its cost is derived from."""

    # The entries of all matrices that a layer multiplies a token with, `[L]`.
    matrices: tuple[float, ...]
    head: int  # entries of the output matrix
    queries: int  # numbers in a token's queries, those of all heads
    kv_bytes: int  # of the keys and values that a layer keeps of a token
    shares: Shares = ()  # what `layer_shares` finds, for paths that run parts of layers
    # By name, the entries that an adapter adds to each layer, `[L]`; all of them count where a part
    # of the layer runs.
    adapters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: Any, shares: Shares = (), adapters: Mapping[str, Adapter] | None = None
    ) -> "ModelShape":
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
            matrices=tuple(sum(entries_of(layer, model)) for layer in layers),
            head=int(model.get_output_embeddings().weight.numel()),
            queries=heads * head_size,
            kv_bytes=2 * kv_heads * head_size * model.dtype.itemsize,
            shares=shares,
            adapters={
                name: tuple(map(adapter.num_entries, range(len(layers))))
                for name, adapter in (adapters or {}).items()
            },
        )


def prompt_flops(shape: ModelShape, plan: Plan, num_tokens: int) -> Flops:
    """Return the FLOPs of reading one prompt of T ≥ 1 tokens in one pass, and predicting one token.

    Source: the usual count (Kaplan et al. 2020, section 2.1), layer by layer as often as it runs.
    """
    steps = list(map(step_of, steps_of(plan)))
    entries = sum(step_executions(s, shape.shares) * shape.matrices[s.layer] for s in steps)
    entries += sum(shape.adapters[s.adapter][s.layer] for s in steps if s.adapter)
    # Two products for each pair of tokens: the score, and the value that it weights.
    pairs = sum(step.run != MLP for step in steps) * num_tokens * num_tokens
    return Flops(
        weights=2 * (shape.head + num_tokens * round(entries)), attention=4 * pairs * shape.queries
    )


def kv_bytes(shape: ModelShape, plan: Plan) -> int:
    """Return the bytes of K and V that a token leaves, as long as every layer still sees it.

    A skipped layer keeps none, nor does an MLP alone; a repeated one keeps those of both passes.
    """
    return shape.kv_bytes * sum(step_of(item).run != MLP for item in steps_of(plan))
