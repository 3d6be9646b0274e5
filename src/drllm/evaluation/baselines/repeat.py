"""Baseline: one block of neighbouring layers run twice, for every question.

Owns which blocks there are and picking the one that helps most. The block is repeated as a whole
(`0 1 2 3 2 3 4`), which decisions can't express beyond a single layer; the baseline is the path,
written by `models.export` as an ordinary model, at its own executions.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from drllm.errors import ConfigError
from drllm.evaluation.baselines.measures import PathMeasure
from drllm.paths import Path

LONGEST = 8
"""Blocks of about seven layers are what the source found best."""


@dataclass(frozen=True, slots=True)
class RepeatedBlock:
    """The block whose repetition helps most, or hurts least.

    Attributes:
        path: Layer indices in the order executed; for `models.export.model.export_path`.
        start: First layer of the block.
        end: Its last layer.
        value: The measure along the path. Of the best of many it is too good by as much as luck
            has a part in it.
        full_value: The measure along the full path.
        num_tried: Blocks compared.
    """

    path: Path
    start: int
    end: int
    value: float
    full_value: float
    num_tried: int


def repeated(start: int, end: int, num_layers: int) -> Path:
    """Return the path that runs a block twice.

    Args:
        start: First layer of the block.
        end: Its last layer.
        num_layers: L.

    Example:
        >>> repeated(1, 2, num_layers=4)
        (0, 1, 2, 1, 2, 3)
    """
    return (*range(end + 1), *range(start, num_layers))


def best_block(
    measure: PathMeasure, num_layers: int, lengths: Iterable[int] = range(1, LONGEST + 1)
) -> RepeatedBlock:
    """Try every block of some lengths, and return the one that the measure likes best.

    Args:
        measure: How good paths are on the questions that may be chosen on.
        num_layers: L.
        lengths: Lengths of the blocks; those beyond L are left out.

    Returns:
        The best block; of equal ones the shortest, then the first.

    Raises:
        ConfigError: No length from 1 to L.

    Source: RYS ("repeat yourself", the public notes on repeating middle blocks of Qwen2-72B); for
        depth up-scaling by copied layers, SOLAR (arXiv 2312.15166).
    """
    usable = sorted({length for length in lengths if 1 <= length <= num_layers})
    if not usable:
        raise ConfigError(
            f"no length of a block to repeat lies between 1 and the model's {num_layers} layers; "
            f"give at least one that does"
        )
    blocks = [
        (start, start + length - 1) for length in usable for start in range(num_layers - length + 1)
    ]
    full: Path = tuple(range(num_layers))
    full_value, *values = measure([full, *(repeated(*block, num_layers) for block in blocks)])
    best = max(range(len(values)), key=values.__getitem__)  # the first of equal ones
    start, end = blocks[best]
    return RepeatedBlock(
        repeated(start, end, num_layers), start, end, values[best], full_value, len(blocks)
    )
