"""What running layers costs: executions in layer equivalents, and the budget they must keep to.

Costs are floats in *layer equivalents*: 1.0 is one execution of one layer. Measured time is never
derived from here. Loads no torch.
"""

import math
from collections.abc import Sequence

from drllm.paths import StaticPath, num_executions, to_path


def max_executions(budget: float, num_layers: int) -> int:
    """Return the most executions of a path within a budget, a factor of L from 1.

    A rounding error of the product never costs one.

    Source: Dr.LLM section 3.1 (paths of at most 2L layers).
    """
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


def path_executions(path: StaticPath) -> float:
    """Return the cost of a static path in layer equivalents."""
    return float(len(path.layers))


def decode_executions(rows: Sequence[Sequence[int]], num_new_tokens: Sequence[int]) -> float | None:
    """Return the mean executions of the forward passes that decode answers.

    The pass that reads the prompt gives the first new token, so n tokens take n - 1 passes more.
    Long answers count more than short ones; None is returned where no answer needed such a pass.
    Each prompt's decisions hold for its whole answer.
    """
    passes = [num - 1 for num in num_new_tokens]
    total = sum(num_executions(row) * num for row, num in zip(rows, passes, strict=True))
    return total / sum(passes) if sum(passes) else None


def share_saved(mean: float, num_layers: int) -> float:
    """Return the share of the full path's executions that were saved (negative: spent more)."""
    return 1.0 - mean / num_layers
