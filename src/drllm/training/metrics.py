"""What trained routers say, counted, and the file that keeps it layer by layer.

Owns counting logits, and `layers.json`. Leaves what is made of counts to `supervision.agreement`
and what they are compared with to `supervision.baselines`.

Axes: B rows, L layers, C = 3 decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drllm.metrics import TRAIN, VALIDATION, Counts, beside, ratios, verdict
from drllm.models.routers.stack import NUM_DECISIONS

LAYERS_FILE = "layers.json"


def count(logits: Tensor, labels: Tensor, loss: float) -> Counts:
    """Count a batch.

    Args:
        logits: `[B, L, C]`.
        labels: `[B, L]` of 0, 1, 2.
        loss: Mean loss of the batch.

    Returns:
        The counts; decisions that would skip every layer cost 1, for one is always executed.
    """
    L, C = labels.shape[1], NUM_DECISIONS
    decided = logits.argmax(dim=-1)  # [B, L]
    cells = (torch.arange(L, device=labels.device) * C + labels) * C + decided
    confusion = torch.bincount(cells.flatten(), minlength=L * C * C).view(L, C, C).tolist()
    return Counts(
        confusion=tuple(tuple(tuple(row) for row in layer) for layer in confusion),
        executions=int(decided.sum(dim=1).clamp(min=1).sum()),
        examples=len(labels),
        loss=loss * len(labels),
    )


def layers_file(epoch: int, parts: Mapping[str, Counts]) -> dict[str, Any]:
    """Return what `layers.json` holds.

    Args:
        epoch: Whose weights the routers have.
        parts: How they fare on the targets trained on, and on those held out, if any are.
    """
    return {
        "schema": "drllm.layers",
        "schema_version": 1,
        "epoch": epoch,
        **{
            split: {
                "examples": counts.examples,
                "executions": counts.executions,
                "loss": counts.loss,
                "confusion": counts.confusion,
            }
            for split, counts in parts.items()
        },
    }


def against_baselines(parts: Mapping[str, Counts]) -> dict[str, Any]:
    """Return what the routers' config tells of routers and baselines, for the model card.

    Args:
        parts: As for `layers_file`.

    Returns:
        `split` (held-out targets, else those trained on), `examples`, `systems` (metrics by name)
        and `verdict` (one sentence).
    """
    trained = parts[TRAIN].labels
    compared = {split: beside(counts, trained) for split, counts in parts.items()}
    split = VALIDATION if VALIDATION in parts else TRAIN
    return {
        "split": split,
        "examples": parts[split].examples,
        "systems": {name: ratios(counts) for name, counts in compared[split].items()},
        "verdict": verdict(compared),
    }
