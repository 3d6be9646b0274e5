"""What an exact method has to run at the least, and at the least that it costs.

One that shares between paths all that they agree on, and between questions what all of them begin
with. What some of the questions alone have in common isn't counted as shared.
"""

from __future__ import annotations

import os.path
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch

from common import Clock
from drllm.cost import distinct_executions
from drllm.evaluation.flops import ModelShape, prompt_flops
from drllm.model.load import BaseModel
from drllm.paths import Decisions, to_path

BATCHES = (1, 2, 4, 8, 16, 32)
MOST_TOKENS = 4096  # in a batch: a larger one costs as much a token
HEAD_TOKENS = (32, 128, 512)
REPEATS = 3


class Work(NamedTuple):
    """Tokens that layers run, each execution counted, and tokens that the head runs."""

    layers: float
    head: float


def list_batches(num_tokens: int) -> list[int]:
    """Return the numbers of prompts that are tried as a batch."""
    return [num for num in BATCHES if num * num_tokens <= MOST_TOKENS] or [1]


def make_cheapest_pass(base: BaseModel, num_tokens: int) -> Callable[[], object]:
    """Return the pass in which a token costs least, or nearly: the largest batch that is tried."""
    ids = torch.randint(100, (list_batches(num_tokens)[-1], num_tokens), device=base.model.device)
    decoder = base.model.get_decoder()
    decoder(ids, use_cache=False)  # makes room
    return partial(decoder, ids, use_cache=False)


def cheapest(base: BaseModel, num_tokens: int, clock: Clock) -> Work:
    """Return the seconds of a token in a layer and in the head, each at its best batch.

    Measured on prompts of so many tokens, in batches of 1 to 32.
    """
    batches = list_batches(num_tokens)
    ids = torch.randint(100, (max(batches), num_tokens), device=base.model.device)
    head = base.model.get_output_embeddings()
    states = torch.randn(max(HEAD_TOKENS), head.weight.shape[1]).to(head.weight)

    def least_seconds(run: torch.nn.Module, inputs: torch.Tensor, **options: bool) -> float:
        times = []
        for _ in range(REPEATS):
            started = clock()
            run(inputs, **options)
            times.append(clock() - started)
        return min(times)

    with torch.no_grad():
        decoder = base.model.get_decoder()
        rows = [least_seconds(decoder, ids[:num], use_cache=False) / num for num in batches]
        tokens = [least_seconds(head, states[:num]) / num for num in HEAD_TOKENS]
    return Work(min(rows) / num_tokens / base.num_layers, min(tokens))


def least_to_search(
    prompts: Sequence[Sequence[int]],
    num_after: Sequence[int],
    answers: Mapping[tuple[int, Decisions], Sequence[int]],
) -> Work:
    """Return what paths on prompts must run, where all that paths agree on runs once.

    `num_after` are the tokens of a prompt's options, which are read behind it and scored;
    `answers` the tokens that were generated under each prompt's paths, none where options are.
    """
    paths_of: defaultdict[int, list[Decisions]] = defaultdict(list)
    for place, path in answers:
        paths_of[place].append(path)
    num_common = 0
    if len(prompts) > 1:
        num_common = len(os.path.commonprefix([*prompts]))  # noqa: RUF071
    layers = num_common * len(_inner(path for _, path in answers))
    for place, paths in paths_of.items():
        num_inner = len(_inner(paths))
        num_own = len(prompts[place]) - num_common + num_after[place]
        num_scored = 1 + num_after[place]
        layers += num_own * num_inner + num_scored * (distinct_executions(paths) - num_inner)
    read = _paths_that_read_answers(answers)
    layers += sum(distinct_executions(paths) for paths in read)
    num_scored = sum(1 + num_after[place] for place, _ in answers)
    return Work(layers, num_scored + sum(len(paths) for paths in read))


def _paths_that_read_answers(
    answers: Mapping[tuple[int, Decisions], Sequence[int]],
) -> list[list[Decisions]]:
    """Return for each token of an answer that is read the paths that read it behind the same text.

    The last token of an answer isn't read.
    """
    paths_of: defaultdict[tuple[int, tuple[int, ...]], list[Decisions]] = defaultdict(list)
    for (place, path), tokens in answers.items():
        for end in range(1, len(tokens)):
            paths_of[place, tuple(tokens[:end])].append(path)
    return list(paths_of.values())


def seconds_to_search(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    num_after: Sequence[int],
    answers: Mapping[tuple[int, Decisions], Sequence[int]],
    clock: Clock,
) -> float:
    """Return the seconds of what `least_to_search` says, at what a token costs at the least."""
    least = least_to_search(prompts, num_after, answers)
    lengths = [len(prompt) + after for prompt, after in zip(prompts, num_after, strict=True)]
    cost = cheapest(base, round(fmean(lengths)), clock)
    return least.layers * cost.layers + least.head * cost.head


def share_of_work(base: BaseModel, decisions: Sequence[int], num_tokens: int) -> float:
    """Return the multiply-adds of a prompt along a plan, as a share of those of the full path."""
    shape = ModelShape.from_model(base.model)
    full = prompt_flops(shape, (1,) * base.num_layers, num_tokens)
    shorter = prompt_flops(shape, tuple(decisions), num_tokens)
    return (shorter.weights + shorter.attention) / (full.weights + full.attention)


def in_words(result: Mapping[str, Any]) -> str:
    """Say how much of the bound a `speedup` has reached."""
    reached = result["speedup"] / result["bound"]
    return (
        f"bound {result['bound']:.2f}: what has to run, at the least that it costs; "
        f"{reached:.0%} of it is reached"
    )


def _inner(paths: Iterable[Decisions]) -> set[tuple[int, ...]]:
    """Return the states that another execution follows; others are needed where they are scored."""
    listed = {to_path(path) for path in paths}
    return {path[:end] for path in listed for end in range(1, len(path))}
