"""Paths and decisions: the two ways to write down which layers run, and how they convert.

A *path* lists layer indices in the order executed (`0 1 3 3 4`). *Decisions* hold one count per
layer: 0 skip, 1 execute, 2 repeat (`1 1 0 2 1`). Every decision vector is a path; a path is a
decision vector only if it visits the layers in order and none more than twice. Loads no torch.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

from drllm.errors import PathError

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
    """Return the decisions as a tuple, or say by PathError why no model can run them.

    None as the number of layers accepts any length of at least 1.
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
    checked, counts = check_path(path, num_layers), [0] * num_layers
    for previous, layer in zip((0, *checked), checked, strict=False):
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
    return tuple(counts)


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
    """Return a path as a tuple of plain ints, or say by PathError why the model can't run it."""
    if not len(path):
        raise PathError("the path is empty; at least one layer must be executed")
    for place, layer in enumerate(path):
        if isinstance(layer, bool) or layer not in range(num_layers):
            raise PathError(
                f"{layer!r} at position {place} of the path (counted from 0) is not a layer of a "
                f"model of {num_layers} layers; give indices from 0 to {num_layers - 1}"
            )
    return tuple(int(layer) for layer in path)
