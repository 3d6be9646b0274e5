"""Measures how fast paths are beside the full model, in a few seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from statistics import median

import torch

from drllm.evaluation.latency import Prepare, device_clock, time_in_turns
from drllm.model.layers import one_token
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.records.static_paths import FULL

NUM_READ = 128  # tokens of the prompt
NUM_WRITTEN = 16  # tokens decoded after it
MAX_ROUNDS = 15
MAX_SECONDS = 20.0  # after so many seconds no further round begins; one always takes place


@torch.no_grad()
def measure_speeds(routed: RoutedModel, paths: Mapping[str, StaticPath]) -> dict[str, float]:
    """Return how many times as fast as the full path each path is.

    Each path reads a prompt of 128 tokens and writes 16, in turns with the others. The result is
    the median over the rounds. A path without an adapter takes as long as its exported checkpoint,
    whose layers are the same.

    Args:
        routed: The model.
        paths: The paths by name, the full one as `full`.
    """
    ids = one_token(routed.model).expand(1, NUM_READ).contiguous()
    calls: dict[str, Prepare] = {}
    for name, path in paths.items():
        calls[name] = partial(_prepare, routed, path, ids)
    clock = device_clock(routed.device)
    time_in_turns(calls, 1, clock)  # not counted
    deadline = time.monotonic() + MAX_SECONDS
    rounds = time_in_turns(calls, MAX_ROUNDS, clock, deadline)
    speeds = {}
    for name in paths:
        speeds[name] = median(seconds[FULL] / seconds[name] for seconds in rounds)
    return speeds


def _prepare(routed: RoutedModel, path: StaticPath, ids: torch.Tensor) -> partial[None]:
    """Return a call that reads and writes along a path."""
    return partial(_read_and_write, routed, path, ids)


def _read_and_write(routed: RoutedModel, path: StaticPath, ids: torch.Tensor) -> None:
    with routed.fixed(path):
        routed.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_WRITTEN,
            min_new_tokens=NUM_WRITTEN,
            do_sample=False,
            pad_token_id=0,
        )
