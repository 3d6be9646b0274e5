"""What training measured of the saved routers: `layers.json`.

Axes: L layers, C = 3 decisions.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from drllm import metrics
from drllm.metrics import ROUTERS, TRAIN, VALIDATION, Counts, with_baselines

LAYERS_FILE = "layers.json"
SIZE = len(metrics.DECISIONS)


class Layers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `layers.json`: counts on the targets trained on, and on those held out, if any are."""

    schema: Literal["drllm.layers"] = "drllm.layers"
    schema_version: Literal[1] = 1
    epoch: int
    train: Counts
    validation: Counts | None = None

    def __post_init__(self) -> None:
        for counts in filter(None, (self.train, self.validation)):
            for layer in counts.confusion or [()]:
                cells = [cell for row in layer for cell in row]
                if (
                    [len(row) for row in layer] != [SIZE] * SIZE
                    or any(cell < 0 or cell != int(cell) for cell in cells)
                    or not sum(cells) == counts.examples > 0
                ):
                    raise ValueError(
                        f"`confusion` isn't {SIZE} x {SIZE} counts a layer that add up to the "
                        f"{counts.examples} examples"
                    )
            if len(counts.confusion) != len(self.train.confusion):
                raise ValueError("`train` and `validation` have different numbers of layers")

    @property
    def parts(self) -> Mapping[str, Mapping[str, Counts]]:
        """By part, what the routers and the baselines scored, by name."""
        found = {TRAIN: self.train} | ({VALIDATION: self.validation} if self.validation else {})
        return {part: with_baselines(counts, self.train.labels) for part, counts in found.items()}

    @property
    def judged(self) -> str:
        """The part by which routers are judged: the held-out one, if there is one."""
        return TRAIN if self.validation is None else VALIDATION

    def against_baselines(self) -> dict[str, Any]:
        """Return what the routers' config says of routers and baselines, for the model card."""
        systems = self.parts[self.judged]
        return {
            "split": self.judged,
            "examples": systems[ROUTERS].examples,
            "systems": {name: metrics.ratios(counts) for name, counts in systems.items()},
            "verdict": metrics.verdict(self.parts),
        }

    def title(self, part: str) -> str:
        """Return what a part is called, with its size."""
        kind = "held-out targets" if part == VALIDATION else "targets trained on"
        return f"{self.parts[part][ROUTERS].examples} {kind}"
