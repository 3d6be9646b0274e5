"""Costs: layer executions in layer equivalents, and the budget of a path.

Costs are floats in *layer equivalents*: 1.0 is one execution of one layer. No measured time is
derived from them. This module doesn't import torch.
"""

import math
from collections.abc import Sequence

from drllm.paths import StaticPath, num_executions, to_path


def max_executions(budget: float, num_layers: int) -> int:
    """Return the maximum executions of a path within a budget, given as a factor of L.

    A rounding error of the product never lowers the result.

    Source: Dr.LLM section 3.1 (paths of at most 2L layers).
    """
    return math.floor(budget * num_layers + 1e-9)


def distinct_executions(rows: Sequence[Sequence[int]]) -> int:
    """Count the executions of one question's paths if common beginnings are run only once.

    Example:
        >>> distinct_executions([(1, 1, 1), (1, 1, 0), (1, 2, 0)])  # 0, 01, 012, 011
        4
    """
    states: dict[tuple[int, int], int] = {}  # (state, layer that runs next) → new state
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

    The pass that reads the prompt gives the first new token, so n tokens take n - 1 more passes.
    Long answers count more than short answers. Return None if no answer needed another pass.

    Args:
        rows: Decisions `[L]` of each prompt, which hold for its whole answer.
        num_new_tokens: Generated tokens of each prompt.
    """
    num_passes = 0
    num_layer_runs = 0
    for decisions, num_tokens in zip(rows, num_new_tokens, strict=True):
        num_passes += num_tokens - 1
        num_layer_runs += num_executions(decisions) * (num_tokens - 1)
    if num_passes == 0:
        return None
    return num_layer_runs / num_passes


def share_saved(mean: float, num_layers: int) -> float:
    """Return the share of the full path's executions that is saved; negative if more are run."""
    return 1.0 - mean / num_layers
