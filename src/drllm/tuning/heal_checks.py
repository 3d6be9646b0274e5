"""Measures on texts how far a path is from the full path."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.score import Request
from drllm.paths import StaticPath
from drllm.records.healed import Losses
from drllm.tuning.heal_texts import Tokens
from drllm.tuning.objectives import KL, LOSS
from drllm.tuning.path_scorer import Item, score_paths

STATE_CACHE_GB = 1.0  # for states that paths share while texts are measured


def measure_kl(routed: RoutedModel, path: StaticPath, texts: Sequence[Tokens]) -> float:
    """Return the mean KL of a path from the full path, in nats per token."""
    requests = [Request(text) for text in texts]
    [mean] = _measure_means(routed, KL, [path], requests)
    return mean


def measure_losses(
    routed: RoutedModel,
    full: StaticPath,
    plain: StaticPath,
    healed: StaticPath,
    texts_by_source: Mapping[str, Sequence[Tokens]],
) -> dict[str, Losses]:
    """Return the next-token losses of texts along three paths, by source.

    Args:
        routed: The model, with the adapter in it.
        full: The full path.
        plain: The path without the adapter.
        healed: The path with the adapter.
        texts_by_source: Name of a source → its texts.
    """
    losses = {}
    for name, texts in texts_by_source.items():
        requests = [Request.from_text(text) for text in texts]
        means = _measure_means(routed, LOSS, [full, plain, healed], requests)
        losses[name] = Losses(
            full=means[0], path=means[1], healed=means[2], num_texts=len(requests)
        )
    return losses


@torch.no_grad()
def _measure_means(
    routed: RoutedModel, objective: str, paths: Sequence[StaticPath], requests: Sequence[Request]
) -> list[float]:
    """Return the mean KL (`KL`) or next-token loss (`LOSS`) of texts along each path."""
    items = [Item(request) for request in requests]
    scores = score_paths(routed, items, paths, objective, STATE_CACHE_GB)
    return [-fmean(values) for values in scores.objective]  # a larger objective is better
