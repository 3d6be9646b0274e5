"""Paths and decisions: the two ways to write down which layers run, and what running them costs.

A *path* lists layer indices in the order executed (`0 1 3 3 4`). *Decisions* hold one count per
layer: 0 skip, 1 execute, 2 repeat (`1 1 0 2 1`). Every decision vector is a path; a path is a
decision vector only if it visits the layers in order and none more than twice. Loads no torch.

Costs are floats in *layer equivalents* (1.0 = one execution of one layer), so that a layer that
runs only in part can be priced later. Measured time is never derived from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

from drllm.errors import ConfigError, PathError

Decisions: TypeAlias = tuple[int, ...]
"""One decision per layer, `[L]`, each 0, 1 or 2, at least one of them not 0."""

Path: TypeAlias = tuple[int, ...]
"""Layer indices from 0 in the order executed, at least one."""


class Decision(IntEnum):
    """What happens at one layer; the value is the number of executions.

    Source: Dr.LLM (arXiv 2510.12773), section 3.
    """

    SKIP = 0
    EXECUTE = 1
    REPEAT = 2


def check_decisions(decisions: Sequence[int], num_layers: int | None = None) -> Decisions:
    """Return the decisions as a tuple, or say in a PathError why no model can run them.

    That is a value outside 0, 1, 2; another length than `num_layers` (None accepts any length of at
    least 1); or nothing executed.
    """
    if num_layers is not None and len(decisions) != num_layers:
        raise PathError(
            f"{len(decisions)} decisions were given for a model of {num_layers} layers; "
            f"give one of 0 (skip), 1 (execute), 2 (repeat) per layer"
        )
    for layer, value in enumerate(decisions):
        if value not in (0, 1, 2):
            raise PathError(
                f"decision {value!r} at layer {layer} is not one of "
                f"0 (skip), 1 (execute), 2 (repeat)"
            )
    values = tuple(int(value) for value in decisions)
    if not any(values):
        raise PathError("all layers are skipped; at least one layer must be executed")
    return values


def full_decisions(num_layers: int) -> Decisions:
    """Return the decisions of the base model itself: every layer once."""
    return (int(Decision.EXECUTE),) * num_layers


def num_executions(decisions: Sequence[int]) -> int:
    """Count the layer executions that decisions cost."""
    return sum(int(value) for value in decisions)


def to_path(decisions: Sequence[int]) -> Path:
    """Write decisions as the path they run; PathError as for `check_decisions`.

    Example:
        >>> to_path([1, 1, 0, 2, 1])
        (0, 1, 3, 3, 4)
    """
    checked = check_decisions(decisions)
    return tuple(layer for layer, count in enumerate(checked) for _ in range(count))


def to_decisions(path: Sequence[int], num_layers: int) -> Decisions:
    """Write a path as decisions `[L]`, if it is one that decisions can express.

    Raises:
        PathError: An index outside the model, a layer visited out of order or more than twice,
            or an empty path.

    Example:
        >>> to_decisions([0, 1, 3, 3, 4], num_layers=5)
        (1, 1, 0, 2, 1)
    """
    counts, previous = [0] * num_layers, 0
    for layer in path:
        if not 0 <= layer < num_layers:
            raise PathError(
                f"layer {layer} is not in a model of {num_layers} layers (0 to {num_layers - 1})"
            )
        if layer < previous:
            raise PathError(
                f"layer {layer} follows layer {previous}; decisions can only express paths "
                f"that visit the layers in order"
            )
        counts[layer] += 1
        if counts[layer] > Decision.REPEAT:
            raise PathError(
                f"layer {layer} is visited more than twice; decisions can only express "
                f"paths that visit a layer once or twice"
            )
        previous = layer
    return check_decisions(counts, num_layers)


def sketch(decisions: Sequence[int]) -> str:
    """Draw decisions as one character per layer: `·` skip, `█` execute, `2` repeat.

    Example:
        >>> sketch([1, 0, 2])
        '█·2'
    """
    return "".join("·█2"[int(value)] for value in decisions)


def edits(decisions: Sequence[int]) -> str:
    """Say in words what decisions change about the full path.

    Example:
        >>> edits([1, 0, 2, 0]), edits([1, 1])
        ('skips layers 1 and 3, repeats layer 2', 'runs every layer once')
    """
    parts = []
    for verb, decision in (("skips", Decision.SKIP), ("repeats", Decision.REPEAT)):
        layers = [str(layer) for layer, value in enumerate(decisions) if value == decision]
        if layers:
            *others, last = layers
            named = f"s {', '.join(others)} and {last}" if others else f" {last}"
            parts.append(f"{verb} layer{named}")
    return ", ".join(parts) or "runs every layer once"


def check_path(path: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return a path as plain ints, or say in a PathError why a model of L layers can't run it."""
    if not len(path):
        raise PathError("the path is empty; at least one layer must be executed")
    for place, layer in enumerate(path):
        if isinstance(layer, bool) or layer not in range(num_layers):
            raise PathError(
                f"{layer!r} at position {place} of the path (counted from 0) is not a layer of a "
                f"model of {num_layers} layers; give indices from 0 to {num_layers - 1}"
            )
    return tuple(int(layer) for layer in path)


# --- what running layers costs


def max_executions(budget: float, num_layers: int) -> int:
    """Return the most executions of a path within a budget, a factor of L from 1.

    A rounding error of the product never costs one. ConfigError for a budget below 1, which the
    full path itself would break.

    Source: Dr.LLM section 3.1 (paths of at most 2L layers).

    Example:
        >>> max_executions(1.1, 30)
        33
    """
    if not budget >= 1:
        raise ConfigError(
            f"budget {budget} is below 1, so not even the full path fits; "
            f"give a factor of the number of layers from 1 to 2"
        )
    return math.floor(budget * num_layers + 1e-9)


def distinct_executions(rows: Sequence[Sequence[int]]) -> int:
    """Count the executions that are left when one question's paths share their beginnings.

    Example:
        >>> distinct_executions([(1, 1, 1), (1, 1, 0), (1, 2, 0)])  # 0, 01, 012, 011
        4
    """
    states: dict[tuple[int, int], int] = {}  # a state and the layer that is run next → the state
    for row in rows:
        state = 0
        for layer in to_path(row):
            state = states.setdefault((state, layer), len(states) + 1)
    return len(states)


def mean_executions(rows: Sequence[Sequence[int]]) -> float:
    """Return the mean cost of several decision vectors in layer equivalents."""
    return sum(map(num_executions, rows)) / len(rows)


def decode_executions(rows: Sequence[Sequence[int]], num_new_tokens: Sequence[int]) -> float | None:
    """Return the mean executions of the forward passes that decode answers.

    The pass that reads the prompt gives the first new token, so n tokens take n - 1 passes more.
    Long answers count more than short ones; None where no answer needed such a pass. A prompt's
    decisions hold for its whole answer, which has at least one token.
    """
    passes = [num - 1 for num in num_new_tokens]
    total = sum(num_executions(row) * num for row, num in zip(rows, passes, strict=True))
    return total / sum(passes) if sum(passes) else None


def share_saved(mean: float, num_layers: int) -> float:
    """Return the share of the full path's executions that were saved (negative: spent more)."""
    return 1.0 - mean / num_layers
