"""Counts what paths and decisions cost, and how many executions a budget allows.

Costs are numbers of *layer equivalents*: 1.0 is one execution of one layer. They say nothing about
measured time. This module doesn't import torch.
"""

import math
from collections.abc import Sequence

from drllm.paths import StaticPath, num_executions, to_path


def max_executions(budget: float, num_layers: int) -> int:
    """Return the maximum number of executions of a path within a budget.

    A rounding error of the product never lowers the result.

    Args:
        budget: The maximum executions as a multiple of the number of layers.
        num_layers: The number of layers of the model.

    Source: Dr.LLM section 3.1 (paths of at most 2L layers).
    """
    return math.floor(budget * num_layers + 1e-9)


def distinct_executions(rows: Sequence[Sequence[int]]) -> int:
    """Count the executions of one question's paths if common beginnings are run only once.

    Example:
        >>> distinct_executions([(1, 1, 1), (1, 1, 0), (1, 2, 0)])  # paths 0 1 2, 0 1 and 0 1 1
        4
    """
    # A state is a beginning of paths, as a number; 0 is the empty beginning.
    next_states: dict[tuple[int, int], int] = {}  # (state, layer that runs next) → next state
    for decisions in rows:
        state = 0
        for layer in to_path(decisions):
            new_state = len(next_states) + 1
            state = next_states.setdefault((state, layer), new_state)
    return len(next_states)


def mean_executions(rows: Sequence[Sequence[int]]) -> float:
    """Return the mean cost of several decision vectors in layer equivalents."""
    return sum(map(num_executions, rows)) / len(rows)


def mean_skips(rows: Sequence[Sequence[int]]) -> float:
    """Return the mean number of layers that several decision vectors skip."""
    num_skips = 0
    for decisions in rows:
        num_skips += sum(value == 0 for value in decisions)
    return num_skips / len(rows)


def path_skips(path: StaticPath, num_layers: int) -> int:
    """Return the number of layers that a static path leaves out."""
    return num_layers - len(set(path.layers))


def path_executions(path: StaticPath) -> float:
    """Return the cost of a static path in layer equivalents."""
    return float(len(path.layers))


def decode_executions(rows: Sequence[Sequence[int]], num_new_tokens: Sequence[int]) -> float | None:
    """Return the mean executions of the forward passes that decode answers.

    The pass that reads the prompt gives the first new token, so n tokens take n - 1 more passes.
    Long answers count more than short answers, because they take more passes. Returns None if no
    answer took another pass.

    Args:
        rows: Decisions `[L]` of each prompt; the whole answer runs under them.
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
    """Return the share of the full path's executions that is saved; negative if `mean` is larger.

    Args:
        mean: The mean executions, in layer equivalents.
        num_layers: The number of layers, which is what the full path costs.
    """
    return 1.0 - mean / num_layers
