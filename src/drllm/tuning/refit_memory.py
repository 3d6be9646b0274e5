"""How much memory a refit takes, and which device has room for its sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from drllm.model.batching import free_bytes
from drllm.model.down_projections import DownProjection
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.lora import read_map_sizes
from drllm.tuning.layer_states import in_float32
from drllm.tuning.refit_work import MapSize

HELD_OUT = 10  # one text in ten is held out, to choose λ
DEVICES_WITHOUT_FLOAT64 = ("mps",)
SHARE_FOR_STATES = 0.25
"""The share of the memory beside the sums that the states of all texts at one layer may take."""
SHARE_FOR_FLOAT32 = 0.5  # the same, of what the weights grow by in float32


def read_size(module: Any) -> MapSize:
    """Return the size of a linear map."""
    num_inputs, num_outputs = read_map_sizes(module)
    return MapSize(num_inputs, num_outputs)


def count_gap_bytes(projection: DownProjection, num_tokens: int) -> int:
    """Return the memory that solving a gap takes: its sums, and held-out tokens if there is a norm.

    `num_tokens` is the number of all calibration tokens.
    """
    size = read_size(projection.module)
    if projection.norm is None:
        return size.num_bytes
    return size.num_bytes + size.held_out_bytes(math.ceil(num_tokens / HELD_OUT))


def count_largest_gap(projections: Iterable[DownProjection], num_tokens: int) -> int:
    """Return the memory of the gap that takes most."""
    return max(count_gap_bytes(projection, num_tokens) for projection in projections)


def choose_sums_device(routed: RoutedModel, num_bytes: int) -> torch.device:
    """Return the device for the sums of a refit: the model's, or the CPU.

    The CPU takes them if the model's device has less free memory than they need, or no float64. For
    a model of 8B weights they take 8 GB beside the 16 GB of the weights.
    """
    device = routed.device
    if device.type in DEVICES_WITHOUT_FLOAT64 or num_bytes > free_bytes(device):
        return torch.device("cpu")
    return device


def find_memory_obstacle(
    routed: RoutedModel, projections: Iterable[DownProjection], num_tokens: int
) -> str:
    """Return why a gap can't be solved in the free memory; empty if all can be."""
    for projection in projections:
        num_bytes = count_gap_bytes(projection, num_tokens)
        free = free_bytes(choose_sums_device(routed, num_bytes))
        if num_bytes > free:
            num_inputs = read_size(projection.module).num_inputs
            return (
                f"refitting {projection.name}, which has {num_inputs} inputs, takes "
                f"{num_bytes / 1e9:.1f} GB of memory beside the model, but only "
                f"{free / 1e9:.1f} GB are free"
            )
    return ""


def estimate_bytes(
    routed: RoutedModel, projections: Iterable[DownProjection], num_tokens: int
) -> int:
    """Return the memory that a refit takes beside the model, in bytes, on all its devices."""
    sums = count_largest_gap(projections, num_tokens)
    beside = count_bytes_beside(routed, choose_sums_device(routed, sums), sums)
    states = _count_state_bytes(routed, num_tokens)
    if not keeps_states(routed, num_tokens, beside):
        states = 0
    widened = _count_widened_bytes(routed)
    if not _has_room_for_float32(routed, beside):
        widened = 0
    return sums + states + widened


def count_bytes_beside(routed: RoutedModel, sums_device: torch.device, sum_bytes: int) -> int:
    """Return how much memory the sums take from the model's device.

    Only a CUDA device has memory of its own; all others share the CPU's.
    """
    if routed.device.type == "cuda" and sums_device.type == "cpu":
        return 0
    return sum_bytes


def keeps_states(routed: RoutedModel, num_tokens: int, bytes_beside: int) -> bool:
    """Tell whether the states of all texts stay in memory from gap to gap, beside the sums."""
    num_bytes = _count_state_bytes(routed, num_tokens)
    return num_bytes < SHARE_FOR_STATES * (free_bytes(routed.device) - bytes_beside)


@contextmanager
def high_precision(routed: RoutedModel, bytes_beside: int = 0) -> Iterator[None]:
    """Compute in float32 inside the block if the memory allows it beside `bytes_beside`.

    bfloat16 rounds a state of norm 24,000, as at the attention sink of SmolLM2, by tens.
    """
    has_room = _has_room_for_float32(routed, bytes_beside)
    with in_float32(routed.model) if has_room else nullcontext():
        yield


def _has_room_for_float32(routed: RoutedModel, bytes_beside: int) -> bool:
    free = free_bytes(routed.device) - bytes_beside
    return _count_widened_bytes(routed) < SHARE_FOR_FLOAT32 * free


def _count_state_bytes(routed: RoutedModel, num_tokens: int) -> int:
    """Return the size of the states of all texts at one layer, along both paths."""
    width: int = routed.config.get_text_config().hidden_size
    return 2 * num_tokens * width * torch.float32.itemsize


def _count_widened_bytes(routed: RoutedModel) -> int:
    """Return by how much the weights grow in float32."""
    return sum(
        weight.numel() * max(0, torch.float32.itemsize - weight.itemsize)
        for weight in routed.model.parameters()
    )
