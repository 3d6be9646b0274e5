"""Paths and decisions: two ways to write down which layers run, and conversions between them.

A *path* lists layer indices in the order executed (`0 1 3 3 4`). *Decisions* hold one count per
layer: 0 skip, 1 execute, 2 repeat (`1 1 0 2 1`). All decisions can be written as a path. A path can
be written as decisions only if it visits the layers in order, and no layer more than twice. A
`StaticPath` is one path for a whole task. This module doesn't import torch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral
from typing import NamedTuple, TypeAlias

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
    """Check decisions, and return them as a tuple.

    If `num_layers` is None, any length of at least 1 is accepted.

    Raises:
        PathError: No model of this depth can run the decisions.
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
    """Write decisions as the path that they run. Raises what `check_decisions` raises.

    Example:
        >>> to_path([1, 1, 0, 2, 1])
        (0, 1, 3, 3, 4)
    """
    path: list[int] = []
    for layer, count in enumerate(check_decisions(decisions)):
        path += [layer] * count
    return tuple(path)


def to_decisions(path: Sequence[int], num_layers: int) -> Decisions:
    """Write a path as decisions `[L]`.

    Raises:
        PathError: The path is empty, has an index that isn't a layer of the model, or visits a
            layer out of order or more than twice.

    Example:
        >>> to_decisions([0, 1, 3, 3, 4], num_layers=5)
        (1, 1, 0, 2, 1)
    """
    if not len(path):
        raise PathError("the path is empty; at least one layer must be executed")
    for place, layer in enumerate(path):
        _check_layer(layer, place, num_layers)
    counts = [0] * num_layers
    previous = 0
    for layer in path:
        if layer < previous:
            raise PathError(
                f"layer {layer} follows layer {previous}; decisions can only express paths "
                f"that visit the layers in order"
            )
        counts[int(layer)] += 1
        if counts[int(layer)] > Decision.REPEAT:
            raise PathError(
                f"layer {layer} is visited more than twice; decisions can only express "
                f"paths that visit a layer once or twice"
            )
        previous = layer
    return tuple(counts)


def sketch(decisions: Sequence[int]) -> str:
    """Draw decisions as one character per layer: `·` skip, `█` execute, `2` repeat.

    Example:
        >>> sketch([1, 0, 2])
        '█·2'
    """
    return "".join("·█2"[int(value)] for value in decisions)


def _check_layer(layer: object, place: int, num_layers: int) -> None:
    """Raise PathError if a model of this depth lacks a layer; `place` is its place in the path."""
    if isinstance(layer, bool) or layer not in range(num_layers):
        raise PathError(
            f"{layer!r} at position {place} of the path (counted from 0) is not a layer of a "
            f"model of {num_layers} layers; give indices from 0 to {num_layers - 1}"
        )


class Gap(NamedTuple):
    """The layers that a path leaves out between two of its layers.

    Attributes:
        layer: The layer that the path runs before the gap.
        next_layer: The layer that the path runs next; L if it runs none, so that the last layers
            are left out.
    """

    layer: int
    next_layer: int


@dataclass(frozen=True, slots=True)
class StaticPath:
    """A path that is the same for a whole task.

    Layers may come more than once and in any order.

    Attributes:
        layers: Layer indices in the order executed, at least one.

    Raises:
        PathError: There are no layers, or a value isn't the index of a layer.

    Example:
        >>> StaticPath([0, 2, 3]).edits(num_layers=4)
        'skips layer 1'
    """

    layers: Path

    def __init__(self, layers: Iterable[int]) -> None:
        indices = tuple(_check_index(layer, place) for place, layer in enumerate(layers))
        if not indices:
            raise PathError("the path is empty; at least one layer must be executed")
        object.__setattr__(self, "layers", indices)  # the class is frozen

    def check(self, num_layers: int) -> "StaticPath":
        """Return this path, or raise PathError if a model of `num_layers` layers can't run it."""
        for place, layer in enumerate(self.layers):
            _check_layer(layer, place, num_layers)
        return self

    def decisions(self, num_layers: int) -> Decisions:
        """Return the layers as decisions `[L]`; raise PathError if decisions can't express them."""
        return to_decisions(self.layers, num_layers)

    def plan(self, num_layers: int) -> "Plan":
        """Return the path as decisions `[L]` if they can express it, else the path itself."""
        try:
            return self.decisions(num_layers)
        except PathError:
            return self

    def edits(self, num_layers: int) -> str:
        """Describe how the path differs from the full path of L layers.

        Example:
            >>> StaticPath([0, 1, 3, 3]).edits(num_layers=4)
            'skips layer 2, repeats layer 3'
        """
        counts = Counter(self.layers)
        skipped_layers = [layer for layer in range(num_layers) if layer not in counts]
        repeated_layers: dict[int, list[int]] = {}  # by the number of repeats
        for layer, count in counts.items():
            if count > 1:
                repeated_layers.setdefault(count - 1, []).append(layer)
        parts: list[str] = []
        if skipped_layers:
            parts.append(f"skips {_name_layers(skipped_layers)}")
        for num_repeats, repeated in repeated_layers.items():
            part = f"repeats {_name_layers(repeated)}"
            if num_repeats == 2:
                part += " twice"
            elif num_repeats > 2:
                part += f" {num_repeats} times"
            parts.append(part)
        if list(self.layers) != sorted(self.layers):
            parts.append("runs the layers in another order")
        if not parts:
            return "runs every layer once"
        return ", ".join(parts)


Plan: TypeAlias = "Decisions | StaticPath"
"""What one row of a batch runs: decisions, or a static path."""


def get_layers(plan: Plan) -> Path:
    """Return the layers that a plan runs, in order."""
    return plan.layers if isinstance(plan, StaticPath) else to_path(plan)


def _check_index(layer: object, place: int) -> int:
    """Check a value without knowing the model's number of layers, and return it as an int."""
    # `Integral` has NumPy's integers too.
    if isinstance(layer, bool) or not isinstance(layer, Integral) or layer < 0:
        raise PathError(
            f"{layer!r} at position {place} of the path (counted from 0) isn't a layer; give an "
            f"index from 0"
        )
    return int(layer)


def _name_layers(layers: Sequence[int]) -> str:
    """Write layers as `layer 3` or `layers 3, 4 and 5`."""
    numbers = [str(layer) for layer in layers]
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    return f"layers {', '.join(numbers[:-1])} and {numbers[-1]}"
