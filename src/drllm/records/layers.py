"""The file `layers.json`: how saved routers agree with their targets, layer by layer.

Axes: L layers, C = 3 decisions.
"""

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from drllm.agreement import (
    DECISIONS,
    ROUTERS,
    TRAIN,
    VALIDATION,
    Confusion,
    Counts,
    add_baselines,
    compute_metrics,
    judge_routers,
)
from drllm.statistics.ranges import Count

LAYERS_FILE = "layers.json"
SIZE = len(DECISIONS)  # C


class Layers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `layers.json`: counts on the training targets and, if there are any, held-out targets."""

    schema: Literal["drllm.layers"] = "drllm.layers"
    schema_version: Literal[1] = 1
    epoch: Count
    train: Counts
    validation: Counts | None = None

    def __post_init__(self) -> None:
        _check_counts(self.train)
        if self.validation is not None:
            _check_counts(self.validation)
            if len(self.validation.confusion) != len(self.train.confusion):
                raise ValueError("`train` and `validation` have different numbers of layers")

    @property
    def parts(self) -> Mapping[str, Mapping[str, Counts]]:
        """The counts of routers and baselines, by part and then by name.

        In both parts the baselines are made from the labels of the training targets.
        """
        trained_labels = self.train.labels
        parts = {TRAIN: add_baselines(self.train, trained_labels)}
        if self.validation is not None:
            parts[VALIDATION] = add_baselines(self.validation, trained_labels)
        return parts

    @property
    def main_part(self) -> str:
        """The part that the routers are judged on: the held-out targets, if there are any."""
        return TRAIN if self.validation is None else VALIDATION

    def against_baselines(self) -> dict[str, Any]:
        """Return the metrics of routers and baselines, for the routers' config and card."""
        systems = self.parts[self.main_part]
        return {
            "split": self.main_part,
            "examples": systems[ROUTERS].examples,
            "systems": {name: compute_metrics(counts) for name, counts in systems.items()},
            "verdict": judge_routers(self.parts),
        }

    def describe_part(self, part: str) -> str:
        """Name a part with its size, as in "40 held-out targets"."""
        kind = "held-out targets" if part == VALIDATION else "targets trained on"
        return f"{self.parts[part][ROUTERS].examples} {kind}"


def _check_counts(counts: Counts) -> None:
    """Refuse counts that don't add up to their number of examples at every layer."""
    has_counts = counts.examples > 0 and len(counts.confusion) > 0
    if not has_counts or not all(_adds_up(layer, counts.examples) for layer in counts.confusion):
        raise ValueError(
            f"`confusion` needs {SIZE} x {SIZE} counts for every layer, which add up to the number "
            f"of examples ({counts.examples})"
        )


def _adds_up(layer: Confusion, num_examples: int) -> bool:
    """Tell whether a layer has C x C whole numbers that add up to the number of examples."""
    cells = list(itertools.chain.from_iterable(layer))
    has_shape = [len(row) for row in layer] == [SIZE] * SIZE
    are_counts = all(cell >= 0 and cell == int(cell) for cell in cells)
    return has_shape and are_counts and sum(cells) == num_examples
