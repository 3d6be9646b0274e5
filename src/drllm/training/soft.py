"""Soft targets: what all valid paths of a question say about each layer, instead of one path.

Owns the mix. Leaves which paths are valid and what each weighs to whoever wrote the targets.

Axes: N targets, L layers, C = 3 decisions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drllm.errors import ConfigError
from drllm.models.routers.stack import NUM_DECISIONS
from drllm.records import SupervisionRecord


def soft_targets(records: Sequence[SupervisionRecord]) -> Tensor:
    """Return at each layer the share of the valid paths' weight that each decision has.

    A target without valid paths keeps its own decisions. The routers still read what the target
    path leaves before their layers: the other paths' states aren't the target path's, so the mix
    is what a router should say of a prompt, not of one path.

    Args:
        records: The targets.

    Returns:
        `[N, L, C]` in float64; sums over C are 1.

    Raises:
        ConfigError: No target has a valid path beside its own, so that nothing would be soft.

    Source: ours.
    """
    mixes = [_mix(record) for record in records]
    if not any(((mix > 0) & (mix < 1)).any() for mix in mixes):
        raise ConfigError(
            "--soft-targets has no effect: no target has a valid path beside its own; make the "
            "targets with supervise --path-weights equal, or leave it out"
        )
    return torch.stack(mixes)


def _mix(record: SupervisionRecord) -> Tensor:
    """Mix one question's paths, `[L, C]`."""
    paths = [(path.decisions, path.weight) for path in record.valid_paths or ()]
    mix = torch.zeros(len(record.optimal_layer_config), NUM_DECISIONS, dtype=torch.float64)
    for decisions, weight in paths or [(record.optimal_layer_config, 1.0)]:
        mix[torch.arange(len(decisions)), list(decisions)] += weight
    return mix / mix.sum(dim=-1, keepdim=True)
