"""How the saved routers agree with their labels, layer by layer, read from `layers.json`.

Owns reading and refusing, and that the baselines stand beside the routers on the same targets.
Leaves metrics and baselines to `supervision`. Axes: L layers, C = 3 decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from drllm.errors import RecordError
from drllm.metrics import DECISIONS, ROUTERS, TRAIN, VALIDATION, Counts, with_baselines
from drllm.reporting.fields import Fields, read_object

LAYERS_FILE = "layers.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What `layers.json` says.

    Attributes:
        epoch: Whose weights the routers have.
        num_layers: L.
        parts: By part (`train`, and `validation` where targets were held out) what the routers
            and the baselines scored, by name.
    """

    epoch: int
    num_layers: int
    parts: Mapping[str, Mapping[str, Counts]]

    @property
    def judged(self) -> str:
        """The part by which routers are judged: the held-out one, if there is one."""
        return VALIDATION if VALIDATION in self.parts else TRAIN

    def title(self, part: str) -> str:
        """Return what a part is called, with its size."""
        kind = "held-out targets" if part == VALIDATION else "targets trained on"
        return f"{self.parts[part][ROUTERS].examples} {kind}"


def read_agreement(path: Path) -> Agreement:
    """Read `layers.json`.

    Raises:
        RecordError: It can't be trusted.
    """
    fields = read_object(path)
    schema = fields.text("schema")
    if (schema, fields.whole("schema_version")) != ("drllm.layers", 1):
        raise RecordError(
            f"{path} says it is {schema!r}, version {fields.whole('schema_version')}; expected "
            f"'drllm.layers', version 1; train again, or use a newer drllm"
        )
    counts = {
        part: _counts(inner)
        for part in (TRAIN, VALIDATION)
        if (inner := fields.optional_object(part)) is not None
    }
    if TRAIN not in counts:
        raise RecordError(f"{path}: {TRAIN!r} is missing; train again")
    depths = sorted({len(each.confusion) for each in counts.values()})
    if len(depths) > 1:
        raise RecordError(f"{path} mixes {depths[0]} and {depths[1]} layers; train again")
    trained = counts[TRAIN].labels
    return Agreement(
        epoch=fields.whole("epoch"),
        num_layers=depths[0],
        parts={part: with_baselines(each, trained) for part, each in counts.items()},
    )


def _counts(fields: Fields) -> Counts:
    examples, layers = fields.whole("examples"), fields.items("confusion")
    if not layers or not all(_is_confusion(layer, examples) for layer in layers):
        raise RecordError(
            f"{fields.where}: 'confusion' isn't 3 x 3 counts a layer that add up to the "
            f"{examples} examples; train again"
        )
    return Counts(
        confusion=tuple(tuple(tuple(row) for row in layer) for layer in layers),
        executions=fields.whole("executions"),
        examples=examples,
        loss=fields.number("loss"),
    )


def _is_confusion(layer: object, examples: int) -> bool:
    size = len(DECISIONS)
    if not isinstance(layer, list) or len(layer) != size:
        return False
    if not all(isinstance(row, list) and len(row) == size for row in layer):
        return False
    cells = [cell for row in layer for cell in row]
    return all(type(n) is int and n >= 0 for n in cells) and sum(cells) == examples > 0
