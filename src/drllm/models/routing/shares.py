"""Which share of a layer's multiply-adds its attention has, and which its MLP.

Derived from the entries of the matrices that a token is multiplied with, as `drllm.cost` counts.
The scores of attention aren't among them: they grow with the prompt.

Axes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from drllm.cost import Shares, path_executions
from drllm.errors import ArchitectureError
from drllm.models.base.layers import base_of
from drllm.paths import StaticPath

if TYPE_CHECKING:
    from drllm.models.routing.routed_model import RoutedModel

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where configurations say how many experts a layer has."""
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k")
"""Where they say how many of them a token runs."""


def layer_shares(routed: RoutedModel) -> Shares:
    """Return the shares of attention and MLP in each layer, `[L]` pairs; they sum to 1.

    ArchitectureError as `Sublayers`, and if nothing says how many of its experts a token runs.
    """
    sublayers, model = routed.injection.sublayers, base_of(routed.model)
    shares = []
    for attention, mlps in zip(sublayers.attention, sublayers.mlps, strict=True):
        ours = sum(entries_of(attention, model))
        share = ours / (ours + sum(sum(entries_of(mlp, model)) for mlp in mlps))
        shares.append((share, 1 - share))
    return shares


def executions_along(routed: RoutedModel, path: StaticPath) -> float:
    """Return the cost of a path on a model in layer equivalents; errors as of `layer_shares`."""
    return path_executions(path, layer_shares(routed) if path.runs_parts else ())


def entries_of(module: nn.Module, model: Any, part: float = 1.0) -> Iterator[float]:
    """Yield the entries of each matrix below a module; of experts, the part that a token runs."""
    own = [each for each in module.parameters(recurse=False) if each.dim() > 1]
    if isinstance(module, nn.Linear):  # its weight may be packed
        yield part * module.in_features * module.out_features
    elif stacked := [each for each in own if each.dim() > 2]:  # [E, ...]; else [E, D], its biases
        for each in stacked:
            yield each.numel() * _chosen(model, each.shape[0])
    else:
        yield from (part * each.numel() for each in own)
    config = model.config.get_text_config()
    numbers = [getattr(config, name, None) for name in EXPERTS]
    if isinstance(module, nn.ModuleList) and len(module) in numbers:
        part = _chosen(model, len(module))
    for child in module.children():
        yield from entries_of(child, model, part)


def _chosen(model: Any, num_experts: int) -> float:
    """Return the part of a layer's experts that a token runs."""
    config = model.config.get_text_config()
    for name in CHOSEN:
        if isinstance(number := getattr(config, name, None), int):
            return number / num_experts
    raise ArchitectureError(
        f"{type(model).__name__} has {num_experts} experts, and its config doesn't say how many of "
        f"them a token runs (as {CHOSEN[0]}), so the cost of a part of a layer isn't derived; give "
        f"a path of whole layers"
    )
