"""Measures on held-out texts how far paths are from the full path."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import msgspec
import torch

from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.score import Request
from drllm.paths import StaticPath
from drllm.records.healed import Losses
from drllm.records.static_paths import FULL
from drllm.statistics.intervals import mean_interval
from drllm.statistics.ranges import Amount
from drllm.statistics.words import signed
from drllm.tuning.heal_texts import Tokens
from drllm.tuning.objectives import KL, LOSS
from drllm.tuning.path_scorer import Item, score_paths

STATE_CACHE_GB = 1.0  # for states that paths share while texts are measured

PLAIN = "path"
REPAIRED = "refit"
HEALED = "healed"
"""The names of the paths that are compared. Without training, the last two are the same."""


class TextLosses(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The next-token losses of the held-out texts of one source, in nats per token.

    Attributes:
        by_path: `FULL`, `PLAIN`, `REPAIRED` or `HEALED` → the loss of each text.
    """

    by_path: dict[str, list[float]]


class LossesBefore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The losses before the training, as they are kept for a resumed run.

    Attributes:
        by_source: Name of a source → its losses.
        seconds: How long the measurement took.
    """

    by_source: dict[str, TextLosses]
    seconds: Amount

    def of(self, path: str) -> list[float]:
        """Return the loss of each text of all sources along one path."""
        values: list[float] = []
        for losses in self.by_source.values():
            values += losses.by_path[path]
        return values

    @property
    def seconds_per_path(self) -> float:
        """How long one path took."""
        num_paths = len(next(iter(self.by_source.values())).by_path)
        return self.seconds / num_paths

    @property
    def is_improved(self) -> bool:
        """Whether the mean loss of the repaired path is lower than that of the plain path."""
        return fmean(self.of(REPAIRED)) < fmean(self.of(PLAIN))

    def describe(self) -> str:
        """Describe what the repair changed: the means, and the interval over texts."""
        plain = self.of(PLAIN)
        repaired = self.of(REPAIRED)
        pairs = zip(repaired, plain, strict=True)
        differences = [new - old for new, old in pairs]
        low, high = (signed(value, 3) for value in mean_interval(differences, seed=0))
        return (
            f"{fmean(repaired):.3f} nats a token, {fmean(plain):.3f} before "
            f"({signed(fmean(differences), 3)}, {low} to {high} over {len(plain)} texts), "
            f"{fmean(self.of(FULL)):.3f} along the full path"
        )


def measure_kl(routed: RoutedModel, path: StaticPath, texts: Sequence[Tokens]) -> float:
    """Return the mean KL of a path from the full path, in nats per token."""
    requests = [Request(text) for text in texts]
    [values] = _measure(routed, KL, [path], requests)
    return fmean(values)


def measure_text_losses(
    routed: RoutedModel,
    paths: Mapping[str, StaticPath],
    texts_by_source: Mapping[str, Sequence[Tokens]],
) -> dict[str, TextLosses]:
    """Return the next-token loss of each text along some paths, by source.

    Args:
        routed: The model, with the adapters of the paths in it.
        paths: The paths, by name.
        texts_by_source: Name of a source → its texts.
    """
    losses = {}
    for source, texts in texts_by_source.items():
        requests = [Request.from_text(text) for text in texts]
        values = _measure(routed, LOSS, list(paths.values()), requests)
        losses[source] = TextLosses(by_path=dict(zip(paths, values, strict=True)))
    return losses


def summarize_losses(
    before: LossesBefore, after: Mapping[str, TextLosses], *, has_refit: bool
) -> dict[str, Losses]:
    """Return the mean losses of each source.

    Args:
        before: The losses before the training.
        after: Name of a source → its losses after the training.
        has_refit: Whether the healed path has the refit.
    """
    losses = {}
    for source, texts in before.by_source.items():
        values = texts.by_path | after[source].by_path
        losses[source] = Losses(
            full=fmean(values[FULL]),
            path=fmean(values[PLAIN]),
            refit=fmean(values[REPAIRED]) if has_refit else None,
            healed=fmean(values[HEALED]),
            num_texts=len(values[FULL]),
        )
    return losses


@torch.no_grad()
def _measure(
    routed: RoutedModel, objective: str, paths: Sequence[StaticPath], requests: Sequence[Request]
) -> list[list[float]]:
    """Return the KL (`KL`) or the next-token loss (`LOSS`) of each text along each path."""
    items = [Item(request) for request in requests]
    scores = score_paths(routed, items, paths, objective, STATE_CACHE_GB)
    # A larger objective is better.
    return [[-value for value in values] for values in scores.objective]
